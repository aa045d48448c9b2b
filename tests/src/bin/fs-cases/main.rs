//! What programs expect of a file system, as cases that run wherever they are put: on this machine's own, and
//! in a guest on a share of it. `fs-cases DIRECTORY [PATTERN]` prints one line per case, its name and how it
//! went.
//!
//! | module | cases of |
//! |---|---|
//! | `contents` | reading, writing, mapping, copying, holes |
//! | `names` | directories, links, renames, special files |
//! | `owners` | permissions, owners, ACLs, extended attributes |
//! | `locks` | locks between processes |
//! | `process` | other processes and other users, which the cases need |

mod contents;
mod locks;
mod names;
mod owners;
mod process;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;

/// Something that has to hold, tried in an empty directory.
type Case = (&'static str, fn(&Path) -> Result<()>);

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let directory = PathBuf::from(arguments.next().context("usage: fs-cases DIRECTORY [PATTERN]")?);
    let pattern = arguments.next().unwrap_or_default().to_string_lossy().into_owned();
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let cases = [contents::CASES, names::CASES, owners::CASES, locks::CASES].concat();
    let mut failed = false;
    for (name, case) in cases.into_iter().filter(|(name, _)| name.contains(&pattern)) {
        let place = directory.join(name);
        fs::create_dir(&place).with_context(|| format!("making {}", place.display()))?;
        match case(&place) {
            Ok(()) => println!("{name} ok"),
            Err(error) => {
                failed = true;
                println!("{name} FAILED");
                println!("\t{error:#}");
            }
        }
        // What a case leaves is looked at by the next, which wants an empty directory of its own.
        let _ = fs::remove_dir_all(&place);
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Insists on an error.
fn refused<T>(result: nix::Result<T>, expected: Errno) -> Result<()> {
    match result {
        Ok(_) => anyhow::bail!("went well, instead of {expected}"),
        Err(error) => {
            ensure!(error == expected, "failed with {error}, instead of {expected}");
            Ok(())
        }
    }
}

/// The same for the standard library's.
fn refused_io<T>(result: std::io::Result<T>, expected: Errno) -> Result<()> {
    refused(result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0))), expected)
}
