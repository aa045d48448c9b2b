use virtio_queue::{DescriptorChain, desc::split::Descriptor};

use crate::memory::GuestMem;

/// The descriptors of a chain, in order.
#[derive(Debug)]
pub struct Descriptors(DescriptorChain<GuestMem>);

impl Descriptors {
    pub(crate) fn new(chain: DescriptorChain<GuestMem>) -> Self {
        Self(chain)
    }

    /// The same chain for a library that walks it itself. It finds what the driver has put there by then, and so has to
    /// check all of it on its own.
    #[must_use]
    pub fn walk_again(&self) -> DescriptorChain<GuestMem> {
        self.0.clone()
    }
}

impl Iterator for Descriptors {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        self.0.next()
    }
}
