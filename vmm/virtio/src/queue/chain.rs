use virtio_queue::DescriptorChain;

use super::Descriptors;
use crate::{DeviceError, buffers::GuestBuffers, memory::GuestMem};

/// The head of a chain that the device holds. Whoever has it has to give the chain back, which takes the head: no chain
/// is given back twice.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the chain has to be given back to the driver"]
pub struct Head(u16);

impl Head {
    /// The head of a chain that the device held when it was saved. An index that the queue does not have is an error
    /// when the chain is given back.
    pub fn restored(index: u16) -> Self {
        Self(index)
    }

    /// The index of the chain's first descriptor.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.0
    }
}

/// A chain that was popped. To walk it is to take it apart, so it is walked once: what is in it may have changed since.
#[derive(Debug)]
#[must_use = "the chain has to be given back to the driver"]
pub struct Chain {
    descriptors: DescriptorChain<GuestMem>,
    mem: GuestMem,
    queue: usize,
}

impl Chain {
    pub(super) fn new(descriptors: DescriptorChain<GuestMem>, mem: GuestMem, queue: usize) -> Self {
        Self { descriptors, mem, queue }
    }

    /// Its head and its descriptors.
    pub fn into_parts(self) -> (Head, Descriptors) {
        (Head(self.descriptors.head_index()), Descriptors::new(self.descriptors))
    }

    /// Its head, what the device may read of it, and what it may write.
    ///
    /// # Errors
    /// [`DeviceError::Driver`] when the chain is malformed (see [`ChainError`](crate::buffers::ChainError)).
    pub fn into_buffers(self) -> Result<(Head, GuestBuffers, GuestBuffers), DeviceError> {
        let (mut readable, mut writable) =
            (GuestBuffers::new(self.mem.clone()), GuestBuffers::new(self.mem.clone()));
        let queue = self.queue;
        let (head, descriptors) = self.into_parts();
        GuestBuffers::append_chain(descriptors, &mut readable, &mut writable)
            .map_err(|error| DeviceError::Driver { queue, what: error.what() })?;
        Ok((head, readable, writable))
    }
}
