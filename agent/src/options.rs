//! Options: of the command line on a plain machine, of the kernel's (`caisson.NAME=VALUE`) as PID 1.

use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::PathBuf;

use caisson_protocol::DEFAULT_ROOT;
use thiserror::Error;
use tracing::Level;

/// Printed for `--help`.
pub const USAGE: &str = "\
Usage: caisson-agent [--listen vsock|unix:PATH] [--root DIR] [--log LEVEL]

As PID 1 the agent sets up the machine first, and takes its options from the
kernel command line: caisson.listen=, caisson.root=, caisson.log=,
caisson.drill=.

  --listen vsock      vsock ports of the agent's protocol (default)
  --listen unix:PATH  a unix socket that answers CONNECT <port>
  --root DIR          state and mounts (default /run/caisson)
  --log LEVEL         error, warn, info (default), debug or trace
  --drill panic       once serving, a task of the agent panics: to try what
                      watches over its health
  --drill die:N       the agent dies of its Nth call, unanswered
  --version           print the version
";

/// Where the agent listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// On the vsock ports.
    Vsock,
    /// On this unix socket.
    Unix(PathBuf),
}

/// How to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where to listen.
    pub listen: Listen,
    /// Directory of state and mounts.
    pub root: PathBuf,
    /// Most verbose level that is logged.
    pub log: Level,
    /// What shall break once the agent serves.
    pub drill: Option<Drill>,
}

/// Something that breaks on purpose, so that what watches over the agent's health can be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drill {
    /// A task panics.
    Panic,
    /// The agent dies of the call with this number, the first of which is 1. PID 1's death is a kernel panic.
    Die(NonZeroU32),
}

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve.
    Run(Options),
    /// Print [`USAGE`].
    Help,
    /// Print the version.
    Version,
}

/// An option can not be understood.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OptionError {
    /// The command line is malformed.
    #[error(transparent)]
    Syntax(#[from] lexopt::Error),
    /// An option's value is malformed.
    #[error("{option}: {value:?} is not valid")]
    Value {
        /// The option.
        option: String,
        /// Its value.
        value: String,
    },
    /// There is no such option.
    #[error("unknown option caisson.{0} on the kernel command line")]
    Unknown(String),
}

impl Default for Options {
    fn default() -> Options {
        Options { listen: Listen::Vsock, root: DEFAULT_ROOT.into(), log: Level::INFO, drill: None }
    }
}

impl Options {
    /// From the arguments after the program's name.
    ///
    /// # Errors
    /// When they are not understood.
    pub fn from_arguments(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, OptionError> {
        use lexopt::prelude::*;
        let mut options = Options::default();
        let mut parser = lexopt::Parser::from_args(arguments);
        while let Some(argument) = parser.next()? {
            match argument {
                Long("help") | Short('h') => return Ok(Command::Help),
                Long("version") | Short('V') => return Ok(Command::Version),
                Long(name @ ("listen" | "root" | "log" | "drill")) => {
                    let name = name.to_owned();
                    options.set(&name, &parser.value()?.string()?)?;
                }
                other => return Err(other.unexpected().into()),
            }
        }
        Ok(Command::Run(options))
    }

    /// From the kernel's command line. Every valid option counts even if another is not: PID 1 has to go on.
    pub fn from_kernel(command_line: &str) -> (Options, Vec<OptionError>) {
        let mut options = Options::default();
        let mut errors = Vec::new();
        for (name, value) in command_line
            .split_ascii_whitespace()
            // What follows is for init: PID 1's own arguments.
            .take_while(|&word| word != "--")
            .filter_map(|word| word.strip_prefix("caisson.")?.split_once('='))
        {
            errors.extend(options.set(name, value).err());
        }
        (options, errors)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), OptionError> {
        let invalid = || OptionError::Value { option: name.to_owned(), value: value.to_owned() };
        match name {
            "listen" if value == "vsock" => self.listen = Listen::Vsock,
            "listen" => {
                let path = value.strip_prefix("unix:").filter(|path| !path.is_empty());
                self.listen = Listen::Unix(path.ok_or_else(invalid)?.into());
            }
            "root" if value.starts_with('/') => self.root = value.into(),
            "root" => return Err(invalid()),
            "log" => self.log = value.parse().map_err(|_| invalid())?,
            "drill" if value == "panic" => self.drill = Some(Drill::Panic),
            "drill" => {
                let call = value.strip_prefix("die:").and_then(|call| call.parse().ok());
                self.drill = Some(Drill::Die(call.ok_or_else(invalid)?));
            }
            _ => return Err(OptionError::Unknown(name.to_owned())),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<Command, OptionError> {
        Options::from_arguments(arguments.iter().map(OsString::from))
    }

    #[test]
    fn arguments() {
        let arguments = ["--listen", "unix:/a", "--root=/b", "--log", "debug", "--drill=panic"];
        let wanted = Options {
            listen: Listen::Unix("/a".into()),
            root: "/b".into(),
            log: Level::DEBUG,
            drill: Some(Drill::Panic),
        };
        assert_eq!(parse(&arguments).unwrap(), Command::Run(wanted));
        assert_eq!(parse(&["-h", "x"]).unwrap(), Command::Help);
        let die = Options { drill: Some(Drill::Die(NonZeroU32::MIN)), ..Options::default() };
        assert_eq!(parse(&["--drill", "die:1"]).unwrap(), Command::Run(die));
        for bad in [
            &["--listen", "tcp:1"][..],
            &["--root", "relative"],
            &["--nonsense"],
            &["x"],
            &["--log", "loud"],
            &["--drill", "fire"],
            &["--drill", "die:0"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_bad_kernel_option_leaves_the_others() {
        let line =
            "console=ttyS0 caisson.log=trace caisson.root=x caisson.what=1 quiet -- caisson.log=error\n";
        let (options, errors) = Options::from_kernel(line);
        assert_eq!(options.log, Level::TRACE);
        assert_eq!(errors.len(), 2);
    }

    proptest! {
        #[test]
        fn command_lines_never_panic(line in ".*") {
            let _ = Options::from_kernel(&line);
        }
    }
}
