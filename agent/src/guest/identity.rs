//! What has to differ between two guests that were restored from one snapshot.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::{GuestError, read};
use crate::state::random;

const URANDOM: &str = "/dev/urandom";
const MACHINE_ID: &str = "/etc/machine-id";
/// HOST_NAME_MAX of Linux.
const MAX_HOSTNAME: usize = 64;
/// Fewer bytes than the generator's key are not a reseed.
const MIN_ENTROPY: usize = 32;
const MAX_ENTROPY: usize = 512;

/// `struct rand_pool_info` of linux/random.h with a buffer.
#[repr(C)]
struct PoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; MAX_ENTROPY],
}

mod requests {
    #![allow(missing_docs, unreachable_pub)] // The macros' functions are public.
    use super::PoolInfo;

    nix::ioctl_write_ptr_bad!(add_entropy, nix::request_code_write!(b'R', 0x03, 8), PoolInfo);
    nix::ioctl_none!(reseed_generator, b'R', 0x07);
}

/// Mixes `entropy` into the kernel's generator and reseeds it, so that every later random byte depends on it.
///
/// # Errors
/// When there is too little or too much of it, or without CAP_SYS_ADMIN.
pub fn reseed(entropy: &[u8]) -> Result<(), GuestError> {
    if !(MIN_ENTROPY..=MAX_ENTROPY).contains(&entropy.len()) {
        return Err(GuestError::Invalid(format!(
            "entropy: {} bytes, not {MIN_ENTROPY} to {MAX_ENTROPY}",
            entropy.len()
        )));
    }
    let size = i32::try_from(entropy.len()).unwrap_or(0);
    let mut pool = PoolInfo { entropy_count: size.saturating_mul(8), buf_size: size, buf: [0; MAX_ENTROPY] };
    for (to, from) in pool.buf.iter_mut().zip(entropy) {
        *to = *from;
    }
    let device = File::options().write(true).open(URANDOM).map_err(GuestError::file("open", URANDOM))?;
    // SAFETY: the structure is laid out as the request demands, its buf_size is within buf, and the kernel only
    // reads it during the call.
    unsafe { requests::add_entropy(device.as_raw_fd(), &raw const pool) }
        .map_err(|errno| GuestError::file("RNDADDENTROPY on", URANDOM)(errno.into()))?;
    // SAFETY: the request takes no argument.
    unsafe { requests::reseed_generator(device.as_raw_fd()) }
        .map_err(|errno| GuestError::file("RNDRESEEDCRNG on", URANDOM)(errno.into()))?;
    Ok(())
}

/// Sets the host name of the calling thread's UTS namespace.
///
/// # Errors
/// When it is not a host name.
pub fn set_hostname(name: &str) -> Result<(), GuestError> {
    check_hostname(name)?;
    nix::unistd::sethostname(name).map_err(|errno: Errno| GuestError::file("sethostname", name)(errno.into()))
}

/// # Errors
/// When `name` can not be a host name.
pub fn check_hostname(name: &str) -> Result<(), GuestError> {
    let valid = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
    if name.is_empty() || name.len() > MAX_HOSTNAME || !valid {
        return Err(GuestError::Invalid(format!("hostname: {name:?} is not a host name")));
    }
    Ok(())
}

/// Sets the machine id: `id`, or a fresh one when it is empty. Returns it.
///
/// # Errors
/// When `id` is not 32 lower-case hexadecimal digits, or can not be stored.
pub fn set_machine_id(id: &str) -> Result<String, GuestError> {
    let id = if id.is_empty() {
        let bytes = random(16).map_err(GuestError::file("read", URANDOM))?;
        uuid_digits(&bytes)
    } else {
        id.to_owned()
    };
    check_machine_id(&id)?;
    fs::create_dir_all("/etc").map_err(GuestError::file("make", "/etc"))?;
    fs::write(MACHINE_ID, format!("{id}\n")).map_err(GuestError::file("write", MACHINE_ID))?;
    Ok(id)
}

/// # Errors
/// When `id` is not as machine-id(5) wants it.
pub fn check_machine_id(id: &str) -> Result<(), GuestError> {
    let digits = id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if id.len() != 32 || !digits || id.bytes().all(|byte| byte == b'0') {
        return Err(GuestError::Invalid(format!("machine_id: {id:?} is not 32 hexadecimal digits")));
    }
    Ok(())
}

/// The machine id, empty when there is none.
pub fn machine_id() -> String {
    read(MACHINE_ID).unwrap_or_default()
}

/// The kernel's boot id. The kernel draws it at its *first* read and keeps it, so nothing may ask for it before a
/// snapshot that is to be cloned.
///
/// # Errors
/// When procfs is not mounted.
pub fn boot_id() -> Result<String, GuestError> {
    read("/proc/sys/kernel/random/boot_id")
}

/// The digits of a version 4 UUID, as machine-id(5) wants them.
fn uuid_digits(bytes: &[u8]) -> String {
    bytes
        .iter()
        .enumerate()
        .map(|(at, &byte)| match at {
            6 => (byte & 0x0f) | 0x40,
            8 => (byte & 0x3f) | 0x80,
            _ => byte,
        })
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn odd_amounts_of_entropy_are_refused() {
        assert!(matches!(reseed(&[1; 31]), Err(GuestError::Invalid(_))));
        assert!(matches!(reseed(&[1; 513]), Err(GuestError::Invalid(_))));
    }

    #[test]
    fn host_names_are_checked() {
        for good in ["a", "web-0.default", &"x".repeat(64)] {
            assert!(check_hostname(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "a/b", "a\n", "ü", &"x".repeat(65)] {
            assert!(check_hostname(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn machine_ids_are_checked() {
        assert!(check_machine_id("0123456789abcdef0123456789abcdef").is_ok());
        for bad in ["", "0123456789ABCDEF0123456789abcdef", "0123", &"0".repeat(32)] {
            assert!(check_machine_id(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn drawn_machine_ids_are_valid(bytes: [u8; 16]) {
            prop_assert!(check_machine_id(&uuid_digits(&bytes)).is_ok());
        }
    }
}
