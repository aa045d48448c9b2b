//! The two forms of the specification's `cgroupsPath`.

use std::path::{Component, Path, PathBuf};

use super::CgroupError;

/// The part of systemd's own tree in which it keeps what belongs to no other.
const DEFAULT_SLICE: &str = "system.slice";

/// The directory of `text` below a hierarchy's root.
///
/// `/kubepods/podX/name` is that directory. `SLICE:PREFIX:NAME` is the scope `PREFIX-NAME.scope` in systemd's slice,
/// whose name spells out the slices that it is in (systemd.slice(5)): `a-b.slice` is in `a.slice`.
pub(super) fn directory(text: &str) -> Result<PathBuf, CgroupError> {
    let parts: Vec<&str> = text.split(':').collect();
    let path = match parts[..] {
        [slice, prefix, name] if !text.contains('/') => scope(slice, prefix, name),
        _ => plain(text),
    };
    path.filter(|path| !path.as_os_str().is_empty()).ok_or_else(|| CgroupError::Path(text.to_owned()))
}

fn plain(text: &str) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    // Lines of /proc/PID/cgroup and of our record would not survive it.
    (!text.contains(['\n', '\0'])).then_some(path)
}

fn scope(slice: &str, prefix: &str, name: &str) -> Option<PathBuf> {
    let valid = |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains(['\n', '\0']);
    let mut path = expand(if slice.is_empty() { DEFAULT_SLICE } else { slice })?;
    let unit = match prefix {
        _ if name.ends_with(".slice") => name.to_owned(),
        "" => format!("{name}.scope"),
        prefix => format!("{prefix}-{name}.scope"),
    };
    path.push(&unit);
    (valid(name) && valid(&unit)).then_some(path)
}

/// A slice, below all the slices that it is in.
fn expand(slice: &str) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    if slice == "-.slice" {
        return Some(path);
    }
    let stem = slice.strip_suffix(".slice")?;
    let mut name = String::new();
    for part in stem.split('-') {
        if part.is_empty() || part.contains(['.', '\n', '\0']) {
            return None;
        }
        if !name.is_empty() {
            name.push('-');
        }
        name.push_str(part);
        path.push(format!("{name}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn plain_paths() {
        for (text, expected) in [
            ("/kubepods/burstable/pod1/c1", "kubepods/burstable/pod1/c1"),
            ("default/c1", "default/c1"),
            ("//default/./c1/", "default/c1"),
            ("/odd:name/with:colons", "odd:name/with:colons"),
        ] {
            assert_eq!(directory(text).unwrap(), Path::new(expected), "{text}");
        }
    }

    #[test]
    fn systemds_names() {
        for (text, expected) in [
            (
                "kubepods-burstable-pod1_2.slice:cri-containerd:c1",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-c1.scope",
            ),
            ("system.slice:caisson:c1", "system.slice/caisson-c1.scope"),
            (":caisson:c1", "system.slice/caisson-c1.scope"),
            ("-.slice::c1", "c1.scope"),
            ("user.slice:x:own.slice", "user.slice/own.slice"),
        ] {
            assert_eq!(directory(text).unwrap(), Path::new(expected), "{text}");
        }
    }

    #[test]
    fn refuses_what_leads_elsewhere() {
        for text in
            ["", "/", "/a/../../b", "..", "a.slice:b:", "a--b.slice:c:d", "a:b:c", "..slice:a:b", "/a\nb"]
        {
            assert!(directory(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_it_says_it_stays_below(text in "[a-z.:/\\-]{0,24}(\\.slice)?:?[a-z./]{0,8}:?[a-z.]{0,5}") {
            if let Ok(path) = directory(&text) {
                prop_assert!(path.components().all(|component| matches!(component, Component::Normal(_))), "{path:?}");
            }
        }
    }
}
