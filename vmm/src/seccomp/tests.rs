use std::{io, os::fd::AsRawFd, panic};

use nix::{
    sys::{
        signal::Signal,
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, fork},
};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::*;

/// Runs `body` in a child of its own; how that ended.
fn in_child(body: impl FnOnce() -> bool) -> WaitStatus {
    // SAFETY: the child does nothing but the body and its end; the C library keeps its allocator usable over
    // a fork.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        ForkResult::Child => {
            let passed = panic::catch_unwind(panic::AssertUnwindSafe(body)).unwrap_or(false);
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(i32::from(!passed)) }
        }
    }
}

fn survives(thread: Thread, body: impl FnOnce() -> bool) -> bool {
    let ended = in_child(|| apply(thread, SeccompMode::Kill).is_ok() && body());
    match ended {
        WaitStatus::Exited(_, 0) => true,
        WaitStatus::Signaled(_, Signal::SIGSYS, _) => false,
        other => panic!("{other:?}"),
    }
}

const ALL: [Thread; 5] = [Thread::Vcpu, Thread::Devices, Thread::Block, Thread::Fs, Thread::Supervisor];

#[test]
fn every_filter_compiles_and_lets_a_thread_live() {
    for thread in ALL {
        assert!(survives(thread, || vec![1_u8; 1 << 20].iter().map(|n| usize::from(*n)).sum::<usize>()
            == 1 << 20));
    }
}

/// From 128 KiB on, the C library moves a list that grows by mremap(2): a guest with many requests in flight makes a
/// disk's list of completions that long.
#[test]
fn every_thread_may_grow_a_list_past_128_kib() {
    let grow = || {
        let mut list: Vec<u64> = Vec::new();
        (0..1 << 17).for_each(|n| list.push(n));
        list.iter().zip(0..).all(|(entry, n)| *entry == n)
    };
    for thread in ALL {
        assert!(survives(thread, grow), "{thread:?}");
    }
}

/// On most hosts the vDSO answers, and the kernel never sees it.
#[test]
fn every_thread_may_ask_the_kernel_for_the_time() {
    let now = || {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel fills the structure.
        unsafe { libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut time) == 0 }
    };
    for thread in ALL {
        assert!(survives(thread, now), "{thread:?}");
        assert!(survives(thread, || nix::sched::sched_yield().is_ok()), "{thread:?}");
    }
}

/// A driver resets its disk by a write that arrives on a processor's thread.
#[test]
fn whoever_resets_a_disk_can_wait_for_what_is_on_its_way() {
    // SAFETY: the descriptor does not exist, so nothing is touched.
    let enter = || unsafe { libc::syscall(libc::SYS_io_uring_enter, -1, 0, 1, 1, 0, 0) } == -1;
    for thread in [Thread::Vcpu, Thread::Devices] {
        assert!(survives(thread, enter), "{thread:?}");
    }
    assert!(!survives(Thread::Fs, enter));
}

#[test]
fn a_thread_that_is_made_behind_the_filter_gives_up_its_capabilities() {
    let spawn = || std::thread::spawn(crate::jail::drop_thread_capabilities).join().is_ok();
    assert!(survives(Thread::Devices, spawn));
}

#[test]
fn what_is_not_named_kills() {
    // SAFETY: no argument is a pointer.
    let ptrace = || unsafe { libc::syscall(libc::SYS_ptrace, 0, 0, 0, 0) } >= -1;
    for thread in ALL {
        assert!(!survives(thread, ptrace), "{thread:?}");
        assert!(!survives(thread, || std::process::Command::new("/bin/true").status().is_err()));
    }
    assert!(!survives(Thread::Vcpu, || std::fs::File::open("/dev/null").is_err()));
    assert!(survives(Thread::Devices, || std::fs::File::open("/dev/null").is_err()), "but it opens nothing");
}

#[test]
fn no_memory_becomes_executable() {
    let map = |protection| {
        // SAFETY: a fresh anonymous mapping.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        at != libc::MAP_FAILED
    };
    for thread in ALL {
        assert!(survives(thread, || map(libc::PROT_READ | libc::PROT_WRITE)), "{thread:?}");
        assert!(!survives(thread, || map(libc::PROT_READ | libc::PROT_EXEC)), "{thread:?}");
        assert!(!survives(thread, || {
            // SAFETY: the protection of no page is changed: there is none at that address.
            let _ = unsafe { libc::mprotect(std::ptr::null_mut(), 4096, libc::PROT_EXEC) };
            true
        }));
    }
}

#[test]
fn only_named_ioctls_pass() {
    // SAFETY: the descriptor does not exist, so nothing is touched.
    let ioctl = |request: u64| unsafe { libc::ioctl(-1, request) } == -1;
    assert!(survives(Thread::Vcpu, || ioctl(0xae80)));
    assert!(!survives(Thread::Vcpu, || ioctl(0x5412)), "TIOCSTI");
    assert!(!survives(Thread::Block, || ioctl(0xae80)));
}

#[test]
fn only_pairs_of_unix_sockets_are_made() {
    let socketpair = |family| {
        let mut pair = [0; 2];
        // SAFETY: there is room for two descriptors.
        unsafe { libc::socketpair(family, libc::SOCK_STREAM, 0, pair.as_mut_ptr()) >= 0 }
    };
    assert!(survives(Thread::Devices, || socketpair(libc::AF_UNIX)));
    assert!(!survives(Thread::Devices, || socketpair(libc::AF_TIPC)));
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_NETLINK, libc::AF_PACKET, libc::AF_VSOCK] {
        assert!(survives(Thread::Devices, || {
            // SAFETY: no pointers.
            let refused = unsafe { libc::socket(family, libc::SOCK_STREAM, 0) } < 0;
            refused && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS)
        }));
    }
}

#[test]
fn the_main_thread_starts_threads_and_no_processes() {
    assert!(survives(Thread::Devices, || {
        let thread = std::thread::Builder::new()
            .name("vcpu0".into())
            .spawn(|| apply(Thread::Vcpu, SeccompMode::Kill).is_ok())
            .unwrap();
        thread.join().unwrap()
    }));
    // SAFETY: the child, if there were one, would end at once.
    assert!(!survives(Thread::Devices, || unsafe { libc::fork() } >= 0));
}

#[test]
fn log_mode_lets_pass() {
    let ended = in_child(|| {
        apply(Thread::Vcpu, SeccompMode::Log).is_ok() && std::fs::File::open("/dev/null").is_ok()
    });
    assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{ended:?}");
}

#[test]
fn the_supervisor_can_wait_and_end() {
    // SAFETY: the grandchild ends at once.
    let ended = in_child(|| match unsafe { fork() }.unwrap() {
        ForkResult::Child => std::process::exit(7),
        ForkResult::Parent { child } => {
            apply(Thread::Supervisor, SeccompMode::Kill).is_ok()
                && matches!(waitpid(child, None), Ok(WaitStatus::Exited(_, 7)))
                && {
                    eprintln!("the supervisor may say something");
                    crate::jail::Ended::Signal(Signal::SIGTERM).mirror()
                }
        }
    });
    assert!(matches!(ended, WaitStatus::Signaled(_, Signal::SIGTERM, _)), "{ended:?}");
}

#[test]
fn an_event_loop_runs_under_the_filter() {
    let epoll = Epoll::new().unwrap();
    let turn = || -> io::Result<bool> {
        let event = EventFd::new(0)?;
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, 1))?;
        event.write(1)?;
        let mut ready = [EpollEvent::default()];
        Ok(epoll.wait(1000, &mut ready)? == 1 && event.read()? == 1)
    };
    assert!(survives(Thread::Devices, || turn().unwrap_or(false)));
}

/// A thread that the main thread starts has to pass the main thread's filter as well.
#[test]
fn workers_get_nothing_that_the_main_thread_lacks() {
    let main = allowed_calls(Thread::Devices);
    for thread in [Thread::Vcpu, Thread::Block] {
        let missing: Vec<_> = allowed_calls(thread).into_iter().filter(|call| !main.contains(call)).collect();
        assert!(missing.is_empty(), "{thread:?}: {missing:?}");
    }
}

/// What is there to be attacked. More than this is a decision, not an accident.
#[test]
fn processors_and_devices_make_few_calls() {
    let driven = filters::guest_driven().len();
    assert!(driven <= 36, "{driven} calls that a guest can cause");
    let all = allowed_calls(Thread::Devices).len();
    // capget and capset among them: the thread of a later processor drops capabilities, which it has none of by then.
    assert!(all <= 58, "{all} calls with those that only a controller can cause");
}

#[test]
fn the_filter_of_shared_directories_allows_all_that_their_workers_do() {
    caisson_virtio::devices::fs::exercise_workers(|| apply(Thread::Fs, SeccompMode::Kill).unwrap());
}

#[test]
fn the_filter_of_the_event_loop_allows_all_that_the_socket_device_does() {
    caisson_virtio::devices::vsock::exercise_device(|| apply(Thread::Devices, SeccompMode::Kill).unwrap());
}
