//! `containerd-shim-caisson-v2`: what containerd runs for a container of the runtime `io.containerd.caisson.v2`.
//!
//! Everything is in the library; here is what each call of the binary leads to.

use std::io::{self, Write};
use std::process::ExitCode;

use caisson_shim::action::{delete, info, serve, start, template};
use caisson_shim::invocation::{Action, Invocation};
use caisson_shim::log;

fn main() -> ExitCode {
    let invocation = match Invocation::parse_from_go(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(error) => error.exit(),
    };
    let answered = match invocation.action {
        _ if invocation.version => Ok(info::version().into_bytes()),
        _ if invocation.info => info::description(),
        Some(Action::Start) => start::run(&invocation),
        Some(Action::Delete) => delete::run(&invocation),
        Some(Action::Undo) => delete::undo(&invocation),
        Some(Action::Template) => template::run(&invocation),
        None => serve::run(&invocation).map(|()| Vec::new()),
    };
    let printed = answered.and_then(|answer| {
        let mut stdout = io::stdout().lock();
        Ok(stdout.write_all(&answer).and_then(|()| stdout.flush())?)
    });
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd reads this together with standard output, and shows it as the reason.
            eprintln!("containerd-shim-caisson-v2: {}", log::one_line(&error));
            ExitCode::FAILURE
        }
    }
}
