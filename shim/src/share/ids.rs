//! The host ids that a pod's files belong to.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::ShareError;
use crate::journal::{Journal, Resource};

/// Ids of one pod: as many as there are without a user database's say, `nobody` among them.
pub const COUNT: u32 = 1 << 16;
/// The first id of the first pod. Distributions and container runtimes hand out lower ones, and so does the VMM for
/// those that are given none: 0x7800_0000 and a process id of at most 22 bits.
pub const BASE: u32 = 0x7900_0000;
/// The last ids stay free: -1 means "no change", and 16 bit versions of ids are near.
const RANGES: u32 = (0xffff_0000 - BASE) / COUNT;

/// User and group ids of the host that nobody else has. The first is the guest's root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first id.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl IdRange {
    /// Claims a range for the pod whose directory is `pod` by an entry in `directory`, which all pods of the node share
    /// and which is made if missing. The claim ends when the journal is undone.
    ///
    /// # Errors
    /// When the directory or the journal cannot be written, or when 34,000 pods have claims.
    pub fn claim(journal: &mut Journal, directory: &Path, pod: &Path) -> Result<IdRange, ShareError> {
        let failed = |source| ShareError::Io { action: "claim ids in", path: directory.to_owned(), source };
        loop {
            let taken = taken(directory).map_err(failed)?;
            let free = (0..RANGES).find(|index| !taken.contains(index));
            let index = free.ok_or(ShareError::NoIds)?;
            let path = directory.join(index.to_string());
            journal.record(Resource::Claim { path: path.clone(), owner: pod.to_owned() })?;
            fs::create_dir_all(directory).map_err(failed)?;
            // A link appears together with what it says, and for one of all who try.
            match symlink(pod, &path) {
                Ok(()) => return Ok(IdRange { first: BASE + index * COUNT, count: COUNT }),
                // Another pod was first; or the last one has just taken the directory with it.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

fn taken(directory: &Path) -> io::Result<BTreeSet<u32>> {
    let mut taken = BTreeSet::new();
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(taken),
        entries => entries?,
    };
    for entry in entries {
        taken.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_have_ids_of_their_own_and_give_them_back() {
        let directory = tempfile::tempdir().unwrap();
        let claims = directory.path().join("ids");
        let pods: Vec<_> = ["a", "b", "c"].iter().map(|name| directory.path().join(name)).collect();
        let mut journals = Vec::new();
        for (pod, index) in pods.iter().zip(0u32..) {
            fs::create_dir(pod).unwrap();
            let mut journal = Journal::open(pod).unwrap();
            let range = IdRange::claim(&mut journal, &claims, pod).unwrap();
            assert_eq!(range, IdRange { first: BASE + index * COUNT, count: COUNT });
            journals.push(journal);
        }
        journals.remove(1).undo().unwrap();
        let mut journal = Journal::open(&pods[1]).unwrap();
        assert_eq!(IdRange::claim(&mut journal, &claims, &pods[1]).unwrap().first, BASE + COUNT);
        journals.push(journal);
        for journal in journals {
            journal.undo().unwrap();
        }
        assert!(!claims.exists());
    }

    #[test]
    fn a_claim_that_was_lost_to_another_pod_leaves_that_ones_alone() {
        let directory = tempfile::tempdir().unwrap();
        let claim = directory.path().join("0");
        symlink("/other", &claim).unwrap();
        Resource::Claim { path: claim.clone(), owner: "/ours".into() }.undo().unwrap();
        assert_eq!(fs::read_link(&claim).unwrap(), Path::new("/other"));
        Resource::Claim { path: claim.clone(), owner: "/other".into() }.undo().unwrap();
        assert!(fs::symlink_metadata(claim).is_err());
    }

    #[test]
    fn a_claim_that_was_not_made_takes_the_directory_that_was() {
        let root = tempfile::tempdir().unwrap();
        let claims = root.path().join("ids");
        fs::create_dir(&claims).unwrap();
        Resource::Claim { path: claims.join("0"), owner: "/ours".into() }.undo().unwrap();
        assert!(!claims.exists());
        // Nothing at all is there.
        Resource::Claim { path: claims.join("0"), owner: "/ours".into() }.undo().unwrap();
    }

    #[test]
    fn no_range_reaches_the_last_ids() {
        assert!(u64::from(BASE) + u64::from(RANGES) * u64::from(COUNT) <= 0xffff_0000);
    }
}
