//! Overlays (Documentation/filesystems/overlayfs.rst) whose files have mapped owners.
//!
//! An overlay cannot be mapped itself. Its layers can: each is shown, with mapped owners, under a short name in a mount
//! namespace that ends when the overlay stands. The short names also keep the options of an image with many layers within
//! the page that mount(2) takes.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::mount::{Mapping, common_parent, mount_here};
use super::options::Options;
use super::{ShareError, at, sys};

/// The most lower layers that the kernel takes (OVL_MAX_STACK).
const MAX_LOWERS: usize = 500;
/// The directory with the upper layer and its work directory, among the layers' short names.
const WRITABLE: &str = "w";
/// Where the overlay itself is mounted.
const MERGED: &str = "m";

/// The layers of an overlay.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overlay {
    /// Topmost first.
    lowers: Vec<PathBuf>,
    /// The upper layer and its work directory.
    writable: Option<(PathBuf, PathBuf)>,
    /// Options that are about no layer.
    others: Vec<String>,
}

impl Overlay {
    pub(super) fn parse(options: &Options) -> Result<Overlay, ShareError> {
        let (mut lowers, mut upper, mut work, mut others) = (Vec::new(), None, None, Vec::new());
        let bad = |option: &str, why| ShareError::Option { option: option.to_owned(), why };
        for option in &options.data {
            match option.split_once('=') {
                Some(("lowerdir", list)) => lowers = list.split(':').map(PathBuf::from).collect(),
                Some(("upperdir", path)) => upper = Some(PathBuf::from(path)),
                Some(("workdir", path)) => work = Some(PathBuf::from(path)),
                _ => others.push(option.clone()),
            }
        }
        let writable = match (upper, work) {
            (None, None) => None,
            (Some(upper), Some(work)) => Some((upper, work)),
            _ => return Err(bad("upperdir", "it takes a workdir, and that takes an upperdir")),
        };
        if lowers.is_empty() || lowers.len() > MAX_LOWERS {
            return Err(bad("lowerdir", "an overlay has 1 to 500 lower layers"));
        }
        let overlay = Overlay { lowers, writable, others };
        if overlay.paths().any(|path| !path.is_absolute() || path.to_string_lossy().contains('\\')) {
            return Err(bad("lowerdir", "layers are absolute paths without backslashes"));
        }
        Ok(overlay)
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.lowers.iter().chain(self.writable.iter().flat_map(|(upper, work)| [upper, work]))
    }

    /// Mounts the overlay. To be called on a thread that has left the host's mounts.
    pub(super) fn assemble(
        &self,
        options: &Options,
        mapping: Option<&Mapping>,
        scaffold: &Path,
    ) -> Result<OwnedFd, ShareError> {
        let none = Options::default();
        let small = Options { data: vec!["mode=0700".into(), "size=4m".into()], ..none };
        mount_here("caisson", scaffold, "tmpfs", &small)?;
        let mut names = Vec::new();
        for (index, lower) in self.lowers.iter().enumerate() {
            let name = index.to_string();
            show(lower, &scaffold.join(&name), true, mapping)?;
            names.push(name);
        }
        let mut data = vec![format!("lowerdir={}", names.join(":"))];
        data.extend(self.others.iter().cloned());
        if let Some((upper, work)) = &self.writable {
            // The kernel wants both on one mount.
            let parent = common_parent(upper, work);
            let shown = scaffold.join(WRITABLE);
            show(&parent, &shown, false, mapping)?;
            for (key, path) in [("upperdir", upper), ("workdir", work)] {
                let below = path.strip_prefix(&parent).unwrap_or(path);
                check_same(path, &shown.join(below))?;
                data.push(format!("{key}={WRITABLE}/{}", below.display()));
            }
        }
        let merged = scaffold.join(MERGED);
        fs::create_dir(&merged).map_err(at("make", &merged))?;
        // The names are relative, as the working directory is this thread's own by now.
        std::env::set_current_dir(scaffold).map_err(at("enter", scaffold))?;
        if let Some(mapping) = mapping {
            // The overlay does its own housekeeping in the layers as who mounts it; root has no mapping there.
            sys::act_as(mapping.range).map_err(ShareError::Thread)?;
        }
        mount_here("overlay", Path::new(MERGED), "overlay", &Options { data, ..options.clone() })?;
        sys::clone_tree(Path::new(MERGED), false).map_err(at("copy the mount of", &merged))
    }
}

/// Shows a layer at `name`, with its owners mapped.
fn show(layer: &Path, name: &Path, read_only: bool, mapping: Option<&Mapping>) -> Result<(), ShareError> {
    let tree = sys::clone_tree(layer, false).map_err(at("open the layer", layer))?;
    let set = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let owners = mapping.map(|mapping| mapping.namespace.as_fd());
    let change = sys::Change { set, propagation: libc::MS_PRIVATE, owners };
    sys::change(tree.as_fd(), false, change)
        .map_err(|source| ShareError::Unmappable { path: layer.to_owned(), source })?;
    fs::create_dir(name).map_err(at("make", name))?;
    sys::attach(tree.as_fd(), name).map_err(at("attach a layer at", name))
}

/// That both paths lead to one directory: a mount between the parent and it would have been left out.
fn check_same(real: &Path, shown: &Path) -> Result<(), ShareError> {
    let real_is = fs::metadata(real).map_err(at("look at", real))?;
    let shown_is = fs::metadata(shown).map_err(at("look at", shown))?;
    if (real_is.dev(), real_is.ino()) == (shown_is.dev(), shown_is.ino()) {
        Ok(())
    } else {
        let option = real.display().to_string();
        Err(ShareError::Option { option, why: "upperdir and workdir are not on one mount" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<Overlay, ShareError> {
        Overlay::parse(&Options::parse(options.iter().copied())?)
    }

    #[test]
    fn takes_containerds_options_apart() {
        let overlay =
            parse(&["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"])
                .unwrap();
        assert_eq!(overlay.lowers, [Path::new("/s/2/fs"), Path::new("/s/1/fs")]);
        assert_eq!(overlay.writable, Some(("/s/3/fs".into(), "/s/3/work".into())));
        assert_eq!(overlay.others, ["index=off"]);
        assert_eq!(parse(&["lowerdir=/a:/b"]).unwrap().writable, None);
    }

    #[test]
    fn refuses_layers_that_would_mean_something_else() {
        for options in [
            &["upperdir=/u", "workdir=/w"][..],
            &["lowerdir=/l", "upperdir=/u"],
            &["lowerdir=relative:/l"],
            &["lowerdir=/l::/data"],
            &["lowerdir=/l\\:/m"],
        ] {
            assert!(matches!(parse(options), Err(ShareError::Option { .. })), "{options:?}");
        }
        let many = format!("lowerdir={}", vec!["/l"; 501].join(":"));
        assert!(parse(&[&many]).is_err());
    }

    #[test]
    fn finds_where_two_paths_part() {
        assert_eq!(common_parent(Path::new("/s/3/fs"), Path::new("/s/3/work")), Path::new("/s/3"));
        assert_eq!(common_parent(Path::new("/a"), Path::new("/b")), Path::new("/"));
    }
}
