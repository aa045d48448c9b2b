//! What a shim that rests gives back.
//!
//! A pod's start runs once through much of the program, and allocates much that nobody needs afterwards; then the pod
//! may run for days without a call for its shim. So once no call has begun or ended for a while, free memory of the heap
//! goes back to the kernel, and the pages of the program leave this process's page tables. They come back by a minor
//! fault each, with their neighbours, when they are used again.
//!
//! What is saved for the node is the heap's part and the page tables. The program's pages stay in the page cache, where
//! all shims share them: they count for none of them any more, and the kernel can take them without looking for who
//! maps them.

use std::fs;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rustix::mm::{Advice, madvise};
use tokio::sync::Notify;
use tokio::time::timeout;
use ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use ttrpc::{Request, Response};

/// So long after the last call's end a shim rests.
const QUIET: Duration = Duration::from_secs(1);
/// So long a thread for work that blocks waits for more. It is gone when the shim rests.
pub const THREAD_KEEP_ALIVE: Duration = Duration::from_millis(500);

/// Whether anything is asked of the shim.
#[derive(Clone, Debug, Default)]
pub struct Activity(Arc<Notify>);

impl Activity {
    /// Has each call of a service noted, at its begin and at its end.
    pub fn of_calls(&self, service: Service) -> Service {
        let methods = service.methods.into_iter().map(|(name, method)| {
            let noted = Noted { method, activity: self.clone() };
            (name, Box::new(noted) as Box<dyn MethodHandler + Send + Sync>)
        });
        Service { methods: methods.collect(), ..service }
    }

    /// Gives memory back whenever all has been quiet for [`QUIET`]. In between it does not wake up.
    pub async fn rest_when_quiet(self) {
        loop {
            self.0.notified().await;
            while timeout(QUIET, self.0.notified()).await.is_ok() {}
            give_back();
        }
    }
}

/// A method whose calls are noted.
struct Noted {
    method: Box<dyn MethodHandler + Send + Sync>,
    activity: Activity,
}

#[async_trait]
impl MethodHandler for Noted {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        self.activity.0.notify_one();
        let answer = self.method.handler(context, request).await;
        self.activity.0.notify_one();
        answer
    }
}

/// Has the heap of all threads in one place, where little of it is lost between them. To be called before there are
/// threads.
pub fn prepare() {
    // SAFETY: it sets a number of the allocator's own.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives back what is not in use now. Whatever of it fails stays.
fn give_back() {
    let this = give_back as fn() as usize;
    let smaps = fs::read_to_string("/proc/self/smaps").map(|smaps| unmodified(&smaps, this));
    // SAFETY: it returns free pages of the heap, which nobody refers to.
    unsafe { libc::malloc_trim(0) };
    for range in smaps.unwrap_or_default() {
        let start = std::ptr::with_exposed_provenance_mut(range.start);
        // SAFETY: these pages are as they are in the program's file, and stay so: nobody can write to them here. Each is
        // read from there again when it is used, the first by this very line. The program stays mapped where it is.
        if let Err(error) = unsafe { madvise(start, range.len(), Advice::LinuxDontNeed) } {
            tracing::debug!(%error, "part of the program stays");
        }
    }
}

/// The mappings, in the text of `/proc/PID/smaps` (proc_pid_smaps(5)), of the file that the address `code` is mapped
/// from, as far as they are read-only and the same as in the file. They are not where pages were copied to be written
/// to: relocations that were made read-only afterwards, breakpoints.
fn unmodified(smaps: &str, code: usize) -> Vec<Range<usize>> {
    let mut mappings = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if let Some(range) = first.split_once('-').and_then(parse_range) {
            // The offset comes next, and what is after the inode is its path.
            let (device, inode) = (words.nth(1), words.next());
            mappings.push((range, second, (device, inode)));
        } else if first == "Anonymous:" && second != "0" {
            mappings.pop();
        }
    }
    let program = mappings.iter().find(|(range, ..)| range.contains(&code)).map(|(_, _, file)| *file);
    let kept = |permissions: &str| matches!(permissions, "r-xp" | "r--p");
    let ours =
        mappings.into_iter().filter(|(_, permissions, file)| kept(permissions) && program == Some(*file));
    ours.map(|(range, ..)| range).collect()
}

fn parse_range((start, end): (&str, &str)) -> Option<Range<usize>> {
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_the_same_as_in_the_program_goes() {
        let smaps = "1000-2000 r--p 00000000 fe:01 77    /bin/shim (deleted)\nRss: 4 kB\nAnonymous: 0 kB\n\
                     2000-5000 r-xp 00001000 fe:01 77    /bin/shim (deleted)\nRss: 4 kB\nAnonymous: 0 kB\n\
                     5000-6000 r--p 00004000 fe:01 77    /bin/shim (deleted)\nRss: 4 kB\nAnonymous: 4 kB\n\
                     6000-7000 rw-p 00005000 fe:01 77    /bin/shim (deleted)\nRss: 0 kB\nAnonymous: 0 kB\n\
                     7000-8000 rw-p 00000000 00:00 0     [heap]\nRss: 4 kB\nAnonymous: 4 kB\n\
                     8000-9000 r--p 00000000 fe:02 77    /lib/other\nRss: 4 kB\nAnonymous: 0 kB\n\
                     a000-b000 r--p 00000000 00:00 0\nRss: 0 kB\nAnonymous: 0 kB\n";
        assert_eq!(unmodified(smaps, 0x2100), [0x1000..0x2000, 0x2000..0x5000]);
        // With a breakpoint in it, a debugger's copy of a page is not thrown away.
        let stopped = smaps.replacen("Anonymous: 0", "Anonymous: 4", 2);
        assert!(unmodified(&stopped, 0x2100).is_empty());
        assert!(unmodified("", 0).is_empty());
    }

    #[test]
    fn the_program_goes_on_without_its_pages() {
        let smaps = || fs::read_to_string("/proc/self/smaps").unwrap();
        let code = give_back as fn() as usize;
        assert!(unmodified(&smaps(), code).iter().any(|range| range.contains(&code)), "{}", smaps());
        let error: Box<dyn std::error::Error> = "a table of functions, which is relocated".into();
        give_back();
        assert!(error.to_string().contains("relocated"));
    }
}
