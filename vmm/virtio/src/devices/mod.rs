//! The devices, one folder each, every folder of the same shape:
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | the device and its [`VirtioDevice`](crate::VirtioDevice) implementation |
//! | `queue.rs` (or several) | what happens to a descriptor chain |
//! | `state.rs` | its saved state, a plain struct, and [`Persist`](crate::Persist) |
//! | `metrics.rs` | its counters |
//! | `tests.rs` | a mock driver against the real device |

pub mod balloon;
pub mod block;
pub mod fs;
pub mod mem;
pub mod net;
pub mod rng;
pub mod vsock;
