//! The control API: how whoever started a machine changes it while it runs.
//!
//! | module | owns |
//! |---|---|
//! | [`protocol`] | requests, responses, events: JSON, one message a packet, versioned |
//! | [`metrics`] | the reply to a request for metrics |
//! | [`socket`] | packets with descriptors on a unix socket |
//! | [`client`] | the typed client |
//!
//! The socket is of type `SOCK_SEQPACKET`, made by whoever starts the process (one end of a pair, or one that
//! listens) or from the machine file. A request may carry descriptors (`SCM_RIGHTS`); in its file names,
//! `fd:0` is the first of them.

pub mod client;
pub mod metrics;
pub mod protocol;
pub mod socket;

pub use client::Client;
