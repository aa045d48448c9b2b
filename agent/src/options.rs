//! Options: of the command line on a plain machine, of the kernel's (`caisson.NAME=VALUE`) as PID 1.

use std::ffi::OsString;
use std::path::PathBuf;

use caisson_protocol::DEFAULT_ROOT;
use thiserror::Error;
use tracing::Level;

#[cfg(any(test, feature = "failpoints"))]
use crate::failpoint::Failpoint;

/// Printed for `--help`.
pub const USAGE: &str = "\
Usage: caisson-agent [--listen vsock|unix:PATH] [--root DIR] [--log LEVEL]

As PID 1 the agent sets up the machine first, and takes its options from the
kernel command line: caisson.listen=, caisson.root=, caisson.log=.

  --listen vsock      vsock ports of the agent's protocol (default)
  --listen unix:PATH  a unix socket that answers CONNECT <port>
  --root DIR          state and mounts (default /run/caisson)
  --log LEVEL         error, warn, info (default), debug or trace
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
    /// What fails on purpose once the agent serves.
    #[cfg(any(test, feature = "failpoints"))]
    pub failpoint: Option<Failpoint>,
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
        Options {
            listen: Listen::Vsock,
            root: DEFAULT_ROOT.into(),
            log: Level::INFO,
            #[cfg(any(test, feature = "failpoints"))]
            failpoint: None,
        }
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
                Long(name @ ("listen" | "root" | "log")) => {
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
            #[cfg(any(test, feature = "failpoints"))]
            "failpoint" => self.failpoint = Some(Failpoint::parse(value).ok_or_else(invalid)?),
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
        let arguments = ["--listen", "unix:/a", "--root=/b", "--log", "debug"];
        let wanted = Options {
            listen: Listen::Unix("/a".into()),
            root: "/b".into(),
            log: Level::DEBUG,
            failpoint: None,
        };
        assert_eq!(parse(&arguments).unwrap(), Command::Run(wanted));
        assert_eq!(parse(&["-h", "x"]).unwrap(), Command::Help);
        for bad in
            [&["--listen", "tcp:1"][..], &["--root", "relative"], &["--nonsense"], &["x"], &["--log", "loud"]]
        {
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

    #[test]
    fn failpoints_are_options_of_the_kernel_only() {
        let failpoint = |value: &str| {
            let (options, errors) = Options::from_kernel(&format!("caisson.failpoint={value}"));
            (options.failpoint, errors.len())
        };
        assert_eq!(failpoint("panic"), (Some(Failpoint::Panic), 0));
        assert_eq!(failpoint("die:1"), (Some(Failpoint::Die(std::num::NonZeroU32::MIN)), 0));
        for bad in ["fire", "die", "die:0", "die:x"] {
            assert_eq!(failpoint(bad), (None, 1), "{bad}");
        }
        assert!(parse(&["--failpoint", "panic"]).is_err());
    }

    proptest! {
        #[test]
        fn command_lines_never_panic(line in ".*") {
            let _ = Options::from_kernel(&line);
        }
    }
}
