//! What a program that starts the VMM sees of it, and nothing of KVM or virtio.
//!
//! | module | owns |
//! |---|---|
//! | [`config`] | the machine file |
//! | [`devices`] | the options of the devices |
//! | [`control`] | the control API: protocol, sockets, client |
//! | [`jail`] | the description of the jail |
//! | [`exit`] | why a machine has ended |
//! | [`descriptor_passing`] | descriptors that come with a message |

pub mod config;
pub mod control;
pub mod descriptor_passing;
pub mod devices;
pub mod exit;
pub mod jail;
