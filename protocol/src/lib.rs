//! The contract between the shim and the agent.
