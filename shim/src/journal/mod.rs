//! The record of all that was made for a pod, and its undoing.
//!
//! What is about to be made is written down first. Whoever comes later, with the shim, the VMM and the agent dead at
//! any instruction, can [`undo`](Journal::undo) a pod from its record alone: processes first, as they use the rest, then
//! the latest thing first, each as if it may never have been made. What cannot be undone stays in the record for the next
//! try. A part of a pod that ends earlier, such as one of its containers, is [undone alone](Journal::undo_where).
//!
//! The record is a file of lines in the pod's directory below `/run`, which no restart of the machine survives; nor
//! does anything that it speaks of. A line counts once its newline is there. A shim that was killed while it wrote a
//! line had not made the thing yet, so a last line without a newline is left out.

mod resource;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::phases::Phases;

pub use resource::{ProcessId, Resource, UndoError};

/// The record's file in the pod's directory.
pub const FILE: &str = "journal";
/// The largest record that is read, in bytes: some thousand things, far more than a pod has.
pub const MAX_SIZE: u64 = 4 << 20;

/// A pod's record, open for more.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    resources: Vec<Resource>,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file cannot be opened, read or written.
    #[error("{action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A line that no shim has written.
    #[error("{path:?}, line {line}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A record beyond [`MAX_SIZE`].
    #[error("{0:?} is larger than {MAX_SIZE} bytes")]
    TooLarge(PathBuf),
    /// A thing that has no line of its own.
    #[error("write down {0:?}")]
    Encode(Resource, #[source] serde_json::Error),
}

/// What one pass of [`Journal::undo`] could not undo.
#[derive(Debug, thiserror::Error)]
#[error("{} of the pod's resources are left", .0.len())]
pub struct Leftovers(pub Vec<(Resource, UndoError)>);

/// Why a pod was not, or not wholly, undone.
#[derive(Debug, thiserror::Error)]
pub enum CleanError {
    /// Its record fails.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Some of it remains.
    #[error(transparent)]
    Leftovers(#[from] Leftovers),
}

impl Journal {
    /// Opens the record in `directory` (absolute, made by the caller), or begins one.
    ///
    /// # Errors
    /// When the file cannot be opened, or holds anything else than a record.
    pub fn open(directory: &Path) -> Result<Journal, JournalError> {
        let path = directory.join(FILE);
        let at = |action| {
            let path = path.clone();
            move |source| JournalError::Io { action, path, source }
        };
        let mut options = OpenOptions::new();
        // Links are not followed: the record must be what this shim wrote.
        options.read(true).append(true).create(true).mode(0o600);
        options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
        let mut file = options.open(&path).map_err(at("open"))?;
        let mut text = Vec::new();
        (&mut file).take(MAX_SIZE + 1).read_to_end(&mut text).map_err(at("read"))?;
        if text.len() as u64 > MAX_SIZE {
            return Err(JournalError::TooLarge(path));
        }
        let complete = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        let resources = parse(text.get(..complete).unwrap_or_default(), &path)?;
        if complete < text.len() {
            file.set_len(complete as u64).map_err(at("truncate"))?;
        }
        Ok(Journal { path, file, resources })
    }

    /// All that is written down, the oldest first.
    #[cfg(test)]
    pub(crate) fn resources(&self) -> &[Resource] {
        &self.resources
    }

    /// Writes down what is about to be made. Only then make it.
    ///
    /// # Errors
    /// When it cannot be written; then do not make it.
    pub fn record(&mut self, resource: Resource) -> Result<(), JournalError> {
        let line = encode(&resource)?;
        let before = self.file.metadata().map_err(|source| self.io("look at", source))?.len();
        if let Err(source) = self.file.write_all(&line) {
            // Half a line in the middle would spoil the record; at its end it is left out anyway.
            self.file.set_len(before).map_err(|source| self.io("truncate", source))?;
            return Err(self.io("write", source));
        }
        self.resources.push(resource);
        #[cfg(any(test, feature = "failpoints"))]
        crate::failpoint::reached();
        Ok(())
    }

    /// Undoes everything, and removes the record. May be called again, and by anyone.
    ///
    /// # Errors
    /// When something remains, which the record then still holds, or when the record cannot be written.
    pub fn undo(mut self) -> Result<(), CleanError> {
        let mut phases = Phases::begin();
        let undone = self.undo_chosen(|_| true, &mut phases);
        tracing::info!(%phases, "the pod is undone");
        undone?;
        // Of one who was killed while it replaced the record. Before the record, which is what brings us back.
        match fs::remove_file(self.next()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.map_err(|source| self.io("remove the successor of", source))?,
        }
        fs::remove_file(&self.path).map_err(|source| self.io("remove", source)).map_err(CleanError::from)
    }

    /// Undoes what `which` chooses, and strikes it off the record.
    ///
    /// # Errors
    /// When something remains, which the record then still holds, or when the record cannot be written.
    pub fn undo_where(&mut self, which: impl Fn(&Resource) -> bool) -> Result<(), CleanError> {
        self.undo_chosen(which, &mut Phases::begin())
    }

    fn undo_chosen(
        &mut self,
        which: impl Fn(&Resource) -> bool,
        phases: &mut Phases,
    ) -> Result<(), CleanError> {
        let mut left = Vec::new();
        let mut kept: Vec<_> = std::mem::take(&mut self.resources).into_iter().map(Some).collect();
        for processes in [true, false] {
            for slot in kept.iter_mut().rev() {
                let chosen = |resource: &mut Resource| {
                    matches!(resource, Resource::Process(_)) == processes && which(resource)
                };
                let Some(resource) = slot.take_if(chosen) else { continue };
                let undone = resource.undo();
                phases.done(resource.kind());
                match undone {
                    Ok(()) => {
                        #[cfg(any(test, feature = "failpoints"))]
                        crate::failpoint::reached();
                    }
                    Err(error) => {
                        left.push((resource.clone(), error));
                        *slot = Some(resource);
                    }
                }
            }
        }
        let before = kept.len();
        self.resources = kept.into_iter().flatten().collect();
        if self.resources.len() < before {
            self.replace()?;
        }
        if left.is_empty() { Ok(()) } else { Err(Leftovers(left).into()) }
    }

    /// Replaces the record in one step, so that one who is killed here leaves the old or the new one.
    fn replace(&mut self) -> Result<(), JournalError> {
        let mut text = Vec::new();
        for resource in &self.resources {
            text.extend(encode(resource)?);
        }
        let next = self.next();
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&next).map_err(|source| self.io("rewrite", source))?;
        file.write_all(&text).map_err(|source| self.io("rewrite", source))?;
        fs::rename(&next, &self.path).map_err(|source| self.io("replace", source))?;
        // More may be written to it, as before only at its end.
        let mut options = OpenOptions::new();
        options.read(true).append(true).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
        self.file = options.open(&self.path).map_err(|source| self.io("open", source))?;
        Ok(())
    }

    fn next(&self) -> PathBuf {
        self.path.with_extension("next")
    }

    fn io(&self, action: &'static str, source: io::Error) -> JournalError {
        JournalError::Io { action, path: self.path.clone(), source }
    }
}

fn encode(resource: &Resource) -> Result<Vec<u8>, JournalError> {
    let mut line =
        serde_json::to_vec(resource).map_err(|source| JournalError::Encode(resource.clone(), source))?;
    line.push(b'\n');
    Ok(line)
}

fn parse(text: &[u8], path: &Path) -> Result<Vec<Resource>, JournalError> {
    let corrupt = |line, source| JournalError::Corrupt { path: path.to_owned(), line, source };
    text.split_inclusive(|byte| *byte == b'\n')
        .enumerate()
        .map(|(index, line)| serde_json::from_slice(line).map_err(|source| corrupt(index + 1, source)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(text: &[u8]) -> (tempfile::TempDir, Result<Journal, JournalError>) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE), text).unwrap();
        let journal = Journal::open(directory.path());
        (directory, journal)
    }

    #[test]
    fn undoes_the_latest_first_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path()).unwrap();
        let outer = directory.path().join("outer");
        let inner = outer.join("inner");
        let file = inner.join("socket");
        journal.record(Resource::Directory(outer.clone())).unwrap();
        fs::create_dir(&outer).unwrap();
        journal.record(Resource::Directory(inner.clone())).unwrap();
        fs::create_dir(&inner).unwrap();
        journal.record(Resource::File(file.clone())).unwrap();
        fs::write(&file, "").unwrap();
        drop(journal);

        // Someone else comes, and knows the record alone.
        Journal::open(directory.path()).unwrap().undo().unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_thing_that_was_never_made_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path()).unwrap();
        let never = directory.path().join("never");
        journal.record(Resource::Directory(never.clone())).unwrap();
        journal.record(Resource::File(never.join("file"))).unwrap();
        journal.record(Resource::Cgroup(never.join("group"))).unwrap();
        journal.record(Resource::Mount(never)).unwrap();
        journal.undo().unwrap();
        assert!(!directory.path().join(FILE).exists());
    }

    #[test]
    fn what_cannot_be_undone_is_kept_for_the_next_try() {
        let directory = tempfile::tempdir().unwrap();
        let full = directory.path().join("full");
        let file = directory.path().join("file");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("unknown"), "").unwrap();
        fs::write(&file, "").unwrap();
        let mut journal = Journal::open(directory.path()).unwrap();
        journal.record(Resource::Directory(full.clone())).unwrap();
        journal.record(Resource::File(file.clone())).unwrap();
        let Err(CleanError::Leftovers(Leftovers(left))) = journal.undo() else { panic!("nothing left?") };
        assert_eq!(left.len(), 1);
        assert!(!file.exists(), "one failure must not keep the rest");

        let again = Journal::open(directory.path()).unwrap();
        assert_eq!(again.resources(), [Resource::Directory(full.clone())]);
        fs::remove_file(full.join("unknown")).unwrap();
        again.undo().unwrap();
        assert!(!full.exists());
    }

    #[test]
    fn a_part_is_undone_alone_and_the_record_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path()).unwrap();
        let files: Vec<_> = ["a", "b", "c", "d"].iter().map(|name| directory.path().join(name)).collect();
        for file in &files[..3] {
            journal.record(Resource::File(file.clone())).unwrap();
            fs::write(file, "").unwrap();
        }
        let second = Resource::File(files[1].clone());
        journal.undo_where(|resource| *resource == second).unwrap();
        journal.record(Resource::File(files[3].clone())).unwrap();
        fs::write(&files[3], "").unwrap();
        assert_eq!(files.iter().map(|file| file.exists()).collect::<Vec<_>>(), [true, false, true, true]);

        let again = Journal::open(directory.path()).unwrap();
        assert_eq!(again.resources(), [0, 2, 3].map(|index: usize| Resource::File(files[index].clone())));
        again.undo().unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn processes_end_before_what_they_use_is_taken_away() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessId::of(child.id().try_into().unwrap()).unwrap();
        let full = directory.path().join("full");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("unknown"), "").unwrap();
        journal.record(Resource::Process(process)).unwrap();
        journal.record(Resource::Directory(full.clone())).unwrap();
        // The directory stays, whose turn would have been first; the process is gone all the same.
        journal.undo().unwrap_err();
        assert!(!child.wait().unwrap().success());
        assert_eq!(Journal::open(directory.path()).unwrap().resources(), [Resource::Directory(full)]);
    }

    #[test]
    fn killed_while_it_replaced_its_record_it_leaves_nothing_either() {
        let (directory, journal) = written(b"{\"file\":\"/nonexistent/a\"}\n");
        fs::write(directory.path().join("journal.next"), "{\"fi").unwrap();
        journal.unwrap().undo().unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_torn_line_is_left_out_and_the_next_one_is_whole() {
        let whole = b"{\"file\":\"/a\"}\n";
        let (directory, journal) = written(&[&whole[..], b"{\"file\":\"/b"].concat());
        let mut journal = journal.unwrap();
        assert_eq!(journal.resources(), [Resource::File("/a".into())]);
        journal.record(Resource::File("/c".into())).unwrap();
        let again = Journal::open(directory.path()).unwrap();
        assert_eq!(again.resources(), [Resource::File("/a".into()), Resource::File("/c".into())]);
    }

    #[test]
    fn a_spoiled_record_is_named_not_guessed_at() {
        let (_directory, journal) = written(b"{\"file\":\"/a\"}\nnonsense\n{\"file\":\"/b\"}\n");
        assert!(matches!(journal, Err(JournalError::Corrupt { line: 2, .. })));
        let (_directory, journal) = written(&vec![b'\n'; usize::try_from(MAX_SIZE).unwrap() + 1]);
        assert!(matches!(journal, Err(JournalError::TooLarge(_))));
    }

    #[test]
    fn a_link_in_the_records_place_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/null", directory.path().join(FILE)).unwrap();
        assert!(matches!(Journal::open(directory.path()), Err(JournalError::Io { action: "open", .. })));
    }

    proptest! {
        #[test]
        fn killed_at_any_byte_a_record_is_a_prefix(names in prop::collection::vec("[a-z\"\\\\\n]{1,8}", 1..6), cut: prop::sample::Index) {
            let directory = tempfile::tempdir().unwrap();
            let mut journal = Journal::open(directory.path()).unwrap();
            for name in &names {
                journal.record(Resource::File(name.into())).unwrap();
            }
            let all = journal.resources().to_vec();
            let text = fs::read(directory.path().join(FILE)).unwrap();
            let (_directory, torn) = written(&text[..cut.index(text.len() + 1)]);
            prop_assert!(all.starts_with(torn.unwrap().resources()));
        }
    }
}
