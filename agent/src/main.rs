//! The `caisson-agent` binary. See the library's documentation for what it is made of.

#![no_main]

use std::error::Error;
use std::ffi::{c_char, c_int};
use std::os::unix::process::parent_id;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::time::Duration;

use caisson_agent::options::{Command, Listen, OptionError, Options, USAGE};
use caisson_agent::reaper::Reaper;
use caisson_agent::state::{Shutdown, State};
use caisson_agent::{connection, init, log, pod, process, service, task};
use caisson_protocol::v1::{ShuttingDown, event};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

/// Stack of a blocking worker; none of them recurses.
const WORKER_STACK: usize = 256 << 10;
/// Blocking workers at a time. They come and go with the work.
const WORKERS: usize = 16;
/// How long calls in flight may take once everything has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long the removal of containers may take on a machine that goes on.
const REMOVAL: Duration = Duration::from_secs(10);
/// Grace of a shutdown that a signal asked for.
const SIGNAL_GRACE_MS: u32 = 3_000;

const USAGE_ERROR: c_int = 2;
/// Exit code after a panic, as of any Rust program.
const PANICKED: c_int = 101;

/// What the C library calls. The standard library's own entry would do more: so that it can say that a stack overflowed,
/// it looks for the main thread's stack in /proc/self/maps, in each helper anew, with 90 KB of functions that read
/// numbers of every kind.
// SAFETY: no library has this symbol; the standard library leaves it to programs without its entry.
#[unsafe(no_mangle)]
extern "C" fn main(_count: c_int, _arguments: *const *const c_char) -> c_int {
    catch_unwind(|| {
        process::prepare();
        run_as_called()
    })
    .unwrap_or(PANICKED)
}

/// Does what the program was started for; its exit code.
fn run_as_called() -> c_int {
    // Before anything else: a helper has one thread, and no business with the rest.
    if let Some(code) = caisson_agent::container::init::run_if_helper() {
        return code;
    }
    if std::process::id() == 1 && parent_id() == 0 {
        run_as_init();
        // Only reached when the kernel refused to end the machine: because this is the first process of a container,
        // which managed to start its runtime's own program and ends here. For the machine's own first process the end
        // is a kernel panic, which the VMM sees and reports.
        return libc::EXIT_FAILURE;
    }
    if std::env::args_os().next().is_some_and(|name| name == pod::init::ARGV0) {
        return pod::init::run();
    }
    match Options::from_arguments(std::env::args_os().skip(1)) {
        Ok(Command::Help) => print!("{USAGE}"),
        Ok(Command::Version) => println!("caisson-agent {}", env!("CARGO_PKG_VERSION")),
        Ok(Command::Run(options)) => {
            let lines = log::start(options.log);
            if let Err(error) = run(&options, false, lines) {
                error!(error, "the agent ends");
                return libc::EXIT_FAILURE;
            }
        }
        Err(error) => {
            eprintln!("caisson-agent: {error}\n{USAGE}");
            return USAGE_ERROR;
        }
    }
    libc::EXIT_SUCCESS
}

/// PID 1: sets up the machine, serves, and ends the machine, whatever happens between.
fn run_as_init() {
    let prepared = init::prepare();
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let (options, errors): (Options, Vec<OptionError>) = Options::from_kernel(&command_line);
    let lines = log::start(options.log);
    for error in errors {
        warn!(%error, "ignored");
    }
    if let Err(error) = prepared {
        // Nothing works without these; the console is all that is left to say so.
        error!(error = &error as &dyn Error, "cannot set up the machine");
        init::power_off(false);
        return;
    }
    let result = catch_unwind(|| run(&options, true, lines));
    let restart = match result {
        Ok(Ok(how)) => how.reboot,
        Ok(Err(error)) => {
            error!(error, "the agent ends");
            false
        }
        Err(_) => {
            error!("the agent panicked");
            false
        }
    };
    init::end_file_systems();
    init::power_off(restart);
}

fn run(options: &Options, is_init: bool, lines: Arc<log::Lines>) -> Result<Shutdown, Box<dyn Error>> {
    if let Err(error) = process::raise_limits(is_init) {
        warn!(%error, "limits stay as they are");
    }
    std::fs::create_dir_all(&options.root)?;
    let runtime = Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(WORKERS)
        .thread_stack_size(WORKER_STACK)
        .build()?;
    let how = serve(&runtime, options, is_init, lines)?;
    // Tasks that block must not hold up the end of the machine.
    runtime.shutdown_background();
    Ok(how)
}

fn serve(
    runtime: &Runtime,
    options: &Options,
    is_init: bool,
    lines: Arc<log::Lines>,
) -> Result<Shutdown, Box<dyn Error>> {
    runtime.block_on(async {
        if !is_init {
            // Orphans of containers are the agent's to reap, PID 1 or not.
            nix::sys::prctl::set_child_subreaper(true)?;
        }
        let state = Arc::new(State::new(&options.root, is_init, Reaper::start()?, lines)?);
        report_panics(&state);
        if is_init {
            follow_kernel_log(&state);
        }
        let incoming = match &options.listen {
            Listen::Vsock => connection::listen_vsock()?,
            Listen::Unix(path) => connection::listen_unix(path)?,
        };
        info!(listen = ?options.listen, version = env!("CARGO_PKG_VERSION"), "serving");
        let mut shutdown = state.shutdown.subscribe();
        let mut emptied = state.emptied.subscribe();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let by_signal = Shutdown { reboot: false, grace_ms: SIGNAL_GRACE_MS };
        let mut server = tokio::spawn(service::serve(state.clone(), incoming));
        #[cfg(feature = "failpoints")]
        if let Some(failpoint) = options.failpoint {
            failpoint.arm();
        }
        let mut serving = true;
        let how = tokio::select! {
            result = &mut server => {
                result??;
                serving = false;
                by_signal
            }
            how = shutdown.wait_for(Option::is_some) => how.ok().and_then(|how| *how).unwrap_or(by_signal),
            _ = terminate.recv() => by_signal,
            _ = interrupt.recv() => by_signal,
        };
        state.shutdown.send_replace(Some(how));
        state.emit(event::Kind::ShuttingDown(ShuttingDown { reason: "asked to".to_owned() }));
        if is_init {
            init::end_processes(how).await;
        }
        state.closing.send_replace(true);
        // So that the last events reach the host; calls that wait for what will not happen are cut off.
        if serving {
            let _ = tokio::time::timeout(REMOVAL, emptied.wait_for(|&emptied| emptied)).await;
            let _ = tokio::time::timeout(LAST_WORDS, server).await;
        }
        Ok(how)
    })
}

/// A panic ends its task alone; the host gets to know.
fn report_panics(state: &Arc<State>) {
    let state = state.clone();
    std::panic::set_hook(Box::new(move |panic| {
        error!(%panic, "panic");
        state.fault("panic", panic.to_string());
    }));
}

fn follow_kernel_log(state: &Arc<State>) {
    let state = state.clone();
    task::spawn(async move {
        if let Err(error) = log::follow_kernel(state.lines.clone()).await {
            state.fault("kernel log", error.to_string());
        }
    });
}
