//! The control API: how whoever started a machine changes it while it runs.
//!
//! | module | owns |
//! |---|---|
//! | `server` | the connections of a running machine |
//! | [`supervisor`] | the event loop that ties a machine and its controllers together |
//!
//! Its protocol and its client are [`caisson_vmm_api::control`].

mod server;
pub mod supervisor;

pub use supervisor::Supervisor;
