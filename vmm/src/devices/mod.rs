//! The devices that are not virtio: their registers are ports.

pub mod exit;
pub mod serial;
