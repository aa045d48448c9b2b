//! Which kernel parameters belong to a pod: those that the kernel keeps for each namespace.

use std::path::PathBuf;

use super::PodError;

const NAMESPACED: [&str; 5] = ["net.", "kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."];
const EXACT: [&str; 1] = ["kernel.domainname"];

/// The file behind a key, in the notation of sysctl(8): dots separate, and a slash stands for a dot.
pub(super) fn path(key: &str) -> Result<PathBuf, PodError> {
    let invalid = || PodError::Invalid { field: "sysctls", value: key.to_owned() };
    let namespaced = NAMESPACED.iter().any(|prefix| key.starts_with(prefix)) || EXACT.contains(&key);
    let plain = key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/:@".contains(&byte));
    if !namespaced || !plain {
        return Err(invalid());
    }
    let mut path = PathBuf::from("/proc/sys");
    for component in key.split('.') {
        let component = component.replace('/', ".");
        if component.is_empty() || component.bytes().all(|byte| byte == b'.') {
            return Err(invalid());
        }
        path.push(component);
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn namespaced_keys() {
        let file = |key| path(key).unwrap().to_string_lossy().into_owned();
        assert_eq!(file("net.ipv4.ip_forward"), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(file("net.ipv4.conf.eth0/1.forwarding"), "/proc/sys/net/ipv4/conf/eth0.1/forwarding");
        assert_eq!(file("kernel.shmmax"), "/proc/sys/kernel/shmmax");
        for bad in [
            "kernel.core_pattern",
            "vm.swappiness",
            "net",
            "net.//.x",
            "net..x",
            "net.",
            "net./",
            "kernel.semx/../y\0",
        ] {
            assert!(path(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_key_leaves_its_directory(key in "net[./a-z]{0,20}") {
            if let Ok(path) = path(&key) {
                prop_assert!(path.starts_with("/proc/sys/net"));
                let plain = path.components().all(|part| part != std::path::Component::ParentDir);
                prop_assert!(plain);
            }
        }
    }
}
