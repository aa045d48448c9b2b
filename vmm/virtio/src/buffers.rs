//! Descriptor chains as host buffers: for devices that let the kernel read or write guest memory in place.

use std::{fmt, ptr};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemory, VolatileSlice};

use crate::{memory::GuestMem, queue::Descriptors};

/// The most buffers that one vectored system call takes (IOV_MAX, readv(2)).
pub const MAX_BUFFERS: usize = 1024;

/// What is wrong with a descriptor chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It has no descriptor.
    #[error("the chain is empty")]
    Empty,
    /// It says that it goes on, but what follows does not exist, loops, or makes it longer than 4 GiB.
    #[error("the chain does not end")]
    Truncated,
    /// It has more buffers than [`MAX_BUFFERS`].
    #[error("the chain has too many buffers")]
    TooLong,
    /// A buffer that the device may only read follows one that it may write (VIRTIO 1.3, section 2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A buffer is not in guest memory.
    #[error("a buffer lies outside guest memory")]
    Address,
}

impl ChainError {
    /// The error in words, for [`DeviceError::Driver`](super::DeviceError::Driver).
    pub fn what(self) -> &'static str {
        match self {
            Self::Empty => "empty descriptor chain",
            Self::Truncated => "descriptor chain without an end",
            Self::TooLong => "descriptor chain of too many buffers",
            Self::Order => "readable descriptor after a writable one",
            Self::Address => "buffer outside guest memory",
        }
    }
}

/// A sequence of buffers in guest memory, laid out for readv(2) and its kin.
///
/// It keeps the memory mapped for as long as it lives, so it may be handed to another thread or to the
/// kernel.
pub struct GuestBuffers {
    mem: GuestMem,
    vecs: Vec<libc::iovec>,
    len: usize,
}

// SAFETY: the pointers are into memory that `mem`, shared by reference count, keeps mapped; the memory is
// accessed only through system calls and volatile copies, as any other thread (a vCPU's) may access it at the
// same time.
unsafe impl Send for GuestBuffers {}

impl fmt::Debug for GuestBuffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestBuffers").field("buffers", &self.vecs.len()).field("len", &self.len).finish()
    }
}

impl GuestBuffers {
    /// No buffers yet.
    pub fn new(mem: GuestMem) -> Self {
        Self { mem, vecs: Vec::new(), len: 0 }
    }

    /// Splits a chain into what the device may read and what it may write, and appends the two.
    ///
    /// Buffers of length zero are left out.
    ///
    /// # Errors
    /// When the chain is malformed, see [`ChainError`]; what was appended by then stays.
    pub fn append_chain(
        chain: Descriptors,
        readable: &mut Self,
        writable: &mut Self,
    ) -> Result<(), ChainError> {
        let mut last: Option<Descriptor> = None;
        for descriptor in chain {
            let written = descriptor.is_write_only();
            if !written && last.is_some_and(|last| last.is_write_only()) {
                return Err(ChainError::Order);
            }
            let side = if written { &mut *writable } else { &mut *readable };
            side.append(descriptor.addr(), descriptor.len())?;
            last = Some(descriptor);
        }
        match last {
            None => Err(ChainError::Empty),
            Some(last) if last.has_next() => Err(ChainError::Truncated),
            Some(_) => Ok(()),
        }
    }

    /// Appends `len` bytes of guest memory from `addr`.
    ///
    /// # Errors
    /// When they are not all in guest memory, or there are [`MAX_BUFFERS`] already.
    pub fn append(&mut self, addr: GuestAddress, len: u32) -> Result<(), ChainError> {
        let len = usize::try_from(len).map_err(|_| ChainError::Address)?;
        let total = self.len.checked_add(len).ok_or(ChainError::TooLong)?;
        for slice in self.mem.get_slices(addr, len) {
            let slice = slice.map_err(|_| ChainError::Address)?;
            if self.vecs.len() == MAX_BUFFERS {
                return Err(ChainError::TooLong);
            }
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.vecs.push(libc::iovec { iov_base, iov_len: slice.len() });
        }
        self.len = total;
        Ok(())
    }

    /// All bytes of all buffers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory that the buffers are in.
    pub fn memory(&self) -> &GuestMem {
        &self.mem
    }

    /// The buffers for a system call. The pointers are valid for as long as `self` is.
    pub fn as_iovecs(&self) -> &[libc::iovec] {
        &self.vecs
    }

    /// Forgets all buffers, keeping the allocation.
    pub fn clear(&mut self) {
        self.vecs.clear();
        self.len = 0;
    }

    /// Drops the first `n` bytes, or all when there are fewer.
    pub fn advance(&mut self, n: usize) {
        let mut left = n;
        let mut whole = 0;
        for vec in &mut self.vecs {
            if vec.iov_len > left {
                vec.iov_base = vec.iov_base.cast::<u8>().wrapping_add(left).cast();
                vec.iov_len -= left;
                left = 0;
                break;
            }
            left -= vec.iov_len;
            whole += 1;
        }
        self.vecs.drain(..whole);
        self.len -= n - left;
    }

    /// The first `n` bytes, or all when there are fewer.
    #[must_use]
    pub fn head(&self, n: usize) -> Self {
        let mut head = Self::new(self.mem.clone());
        for vec in &self.vecs {
            let iov_len = vec.iov_len.min(n - head.len);
            if iov_len == 0 {
                break;
            }
            head.vecs.push(libc::iovec { iov_base: vec.iov_base, iov_len });
            head.len += iov_len;
        }
        head
    }

    /// Cuts off and returns all from byte `at` on. Nothing when there are not that many bytes.
    pub fn split_off(&mut self, at: usize) -> Self {
        let mut tail = Self::new(self.mem.clone());
        let mut before = 0;
        for (index, vec) in self.vecs.iter_mut().enumerate() {
            let keep = at.saturating_sub(before);
            if keep >= vec.iov_len {
                before += vec.iov_len;
                continue;
            }
            let rest = libc::iovec {
                iov_base: vec.iov_base.cast::<u8>().wrapping_add(keep).cast(),
                iov_len: vec.iov_len - keep,
            };
            vec.iov_len = keep;
            let kept = if keep == 0 { index } else { index + 1 };
            tail.vecs.push(rest);
            tail.vecs.extend(self.vecs.drain(index + 1..));
            self.vecs.truncate(kept);
            tail.len = self.len - at;
            self.len = at;
            break;
        }
        tail
    }

    /// Copies from `offset` bytes on into `to`; returns how many bytes there were to copy.
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) -> usize {
        let mut done = 0;
        self.for_range(offset, to.len(), |slice| {
            if let Some(part) = to.get_mut(done..done + slice.len()) {
                slice.copy_to(part);
            }
            done += slice.len();
        });
        done
    }

    /// Copies `from` to the buffers, from `offset` bytes on; returns how many bytes there was room for.
    pub fn copy_from(&self, offset: usize, from: &[u8]) -> usize {
        let mut done = 0;
        self.for_range(offset, from.len(), |slice| {
            if let Some(part) = from.get(done..done + slice.len()) {
                slice.copy_from(part);
            }
            done += slice.len();
        });
        done
    }

    /// Writes zeros to all buffers.
    pub fn zero(&self) {
        self.for_range(0, self.len, |slice| {
            // SAFETY: the slice is writable memory of that length, and racing accesses are the guest's alone.
            unsafe { ptr::write_bytes(slice.ptr_guard_mut().as_ptr(), 0, slice.len()) };
        });
    }

    /// Calls `f` on each piece of the `len` bytes from `offset` on, as far as there are any.
    fn for_range(&self, offset: usize, len: usize, mut f: impl FnMut(VolatileSlice<'_>)) {
        let mut skip = offset;
        let mut left = len;
        for vec in &self.vecs {
            if left == 0 {
                break;
            }
            if skip >= vec.iov_len {
                skip -= vec.iov_len;
                continue;
            }
            let part = (vec.iov_len - skip).min(left);
            // SAFETY: within a buffer that `append` took from guest memory, which `self.mem` keeps mapped.
            let slice = unsafe { VolatileSlice::new(vec.iov_base.cast::<u8>().wrapping_add(skip), part) };
            f(slice);
            skip = 0;
            left -= part;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;
    use crate::{
        mock::{Buffer, MockQueue},
        queue::DeviceQueue,
    };

    fn memory() -> GuestMem {
        // Two regions that touch, and one apart from them.
        let ranges =
            [(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000), (GuestAddress(0x2_0000), 0x1000)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    fn buffers(mem: &GuestMem, parts: &[(u64, u32)]) -> GuestBuffers {
        let mut buffers = GuestBuffers::new(mem.clone());
        for &(addr, len) in parts {
            buffers.append(GuestAddress(addr), len).unwrap();
        }
        buffers
    }

    fn split(mem: &GuestMem, queue: &mut DeviceQueue) -> Result<(usize, usize), ChainError> {
        let (mut readable, mut writable) = (GuestBuffers::new(mem.clone()), GuestBuffers::new(mem.clone()));
        let (_, chain) = queue.pop().unwrap().unwrap().into_parts();
        GuestBuffers::append_chain(chain, &mut readable, &mut writable)?;
        Ok((readable.len(), writable.len()))
    }

    #[test]
    fn a_buffer_may_span_adjacent_regions() {
        let mem = memory();
        let spanning = buffers(&mem, &[(0x7ff0, 0x20)]);
        assert_eq!((spanning.len(), spanning.as_iovecs().len()), (0x20, 2));
        assert_eq!(spanning.copy_from(0x8, &[7; 0x10]), 0x10);
        assert_eq!(mem.read_obj::<[u8; 16]>(GuestAddress(0x7ff8)).unwrap(), [7; 0x10]);
    }

    #[test]
    fn a_buffer_outside_memory_is_refused() {
        let mut none = GuestBuffers::new(memory());
        for (addr, len) in [(0xfff0, 0x20), (0x1_0000, 1), (u64::MAX, 2), (u64::MAX - 1, u32::MAX)] {
            assert_eq!(none.append(GuestAddress(addr), len), Err(ChainError::Address), "{addr:#x}");
        }
    }

    #[test]
    fn chains_are_split_and_checked() {
        let mem = memory();
        let mut mock = MockQueue::new(&mem, 0, 16);
        let mut queue = mock.device_queue();
        mock.add(&[Buffer::readable(0x4000, 16), Buffer::writable(0x5000, 512), Buffer::writable(0x6000, 1)]);
        assert_eq!(split(&mem, &mut queue), Ok((16, 513)));
        mock.add_indirect(0x3000, &[Buffer::readable(0x4000, 16), Buffer::writable(0x6000, 1)]);
        assert_eq!(split(&mem, &mut queue), Ok((16, 1)));
        mock.add(&[Buffer::writable(0x5000, 512), Buffer::readable(0x4000, 16)]);
        assert_eq!(split(&mem, &mut queue), Err(ChainError::Order));
        mock.add(&[Buffer::readable(0xffff, 2)]);
        assert_eq!(split(&mem, &mut queue), Err(ChainError::Address));
    }

    #[test]
    fn loops_and_dangling_links_are_found() {
        let mem = memory();
        let mut mock = MockQueue::new(&mem, 0, 16);
        let mut queue = mock.device_queue();
        mock.raw_descriptor(3, 0x4000, 1, MockQueue::NEXT, 3);
        mock.offer(3);
        assert_eq!(split(&mem, &mut queue), Err(ChainError::Truncated));
        mock.raw_descriptor(4, 0x4000, 1, MockQueue::NEXT, 99);
        mock.offer(4);
        assert_eq!(split(&mem, &mut queue), Err(ChainError::Truncated));
        mock.offer(200);
        assert_eq!(split(&mem, &mut queue), Err(ChainError::Empty));
    }

    proptest! {
        /// Splitting and advancing move boundaries and nothing else.
        #[test]
        fn splitting_keeps_every_byte(
            parts in proptest::collection::vec((0u64..0x8000, 0u32..300), 0..12), at in 0usize..3000, skip in 0usize..3000,
        ) {
            let mem = memory();
            let pattern: Vec<u8> = (0..=u8::MAX).cycle().take(0x1_0000).collect();
            mem.write_slice(&pattern, GuestAddress(0)).unwrap();
            let whole = buffers(&mem, &parts);
            let mut expected = vec![0; whole.len()];
            prop_assert_eq!(whole.copy_to(0, &mut expected), expected.len());

            let front = whole.head(at);
            let mut first = vec![0; front.len()];
            prop_assert_eq!(front.copy_to(0, &mut first), front.len());
            prop_assert_eq!(&first[..], &expected[..at.min(expected.len())]);

            let mut head = buffers(&mem, &parts);
            let tail = head.split_off(at);
            prop_assert_eq!(head.len() + tail.len(), expected.len());
            let mut got = vec![0; expected.len()];
            let n = head.copy_to(0, &mut got);
            prop_assert_eq!(n, at.min(expected.len()));
            tail.copy_to(0, &mut got[n..]);
            prop_assert_eq!(&got, &expected);

            let mut rest = buffers(&mem, &parts);
            rest.advance(skip);
            let mut got = vec![0; rest.len()];
            rest.copy_to(0, &mut got);
            prop_assert_eq!(&got[..], &expected[skip.min(expected.len())..]);
        }
    }
}
