//! The arenas that the C library allocates from.

/// Makes all threads allocate from one arena.
///
/// By default each thread gets its own, for which the C library reserves and cuts 64 MiB of address space: more
/// than a processor's thread does otherwise before its guest runs, and pages that are never used again. Threads
/// here allocate too rarely to stand in each other's way.
pub fn limit_to_one() {
    // SAFETY: the call sets a limit, and has no other effect. Heaps that exist already stay.
    let accepted = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    if accepted == 0 {
        tracing::debug!("the C library keeps a heap for each thread");
    }
}
