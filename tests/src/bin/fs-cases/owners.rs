//! Permissions, owners, ACLs, extended attributes.

use std::{
    ffi::CString,
    fs::{self, File},
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, chown, symlink},
    },
    path::Path,
};

use anyhow::{Result, ensure};
use nix::{errno::Errno, libc};

use crate::{Case, process::as_user, refused, refused_io};

pub(crate) const CASES: &[Case] = &[
    ("owners", owners),
    ("permissions", permissions),
    ("supplementary_groups", groups),
    ("setgid_directory", setgid_directory),
    ("sticky", sticky),
    ("set_id_bits_go", set_id_bits),
    ("xattrs", xattrs),
    ("xattrs_of_links", link_xattrs),
    ("acl_grants", acl),
    ("acl_default", default_acl),
    ("file_capabilities", file_capabilities),
];

const USER: u32 = 1234;
const GROUP: u32 = 2345;
const OTHER: u32 = 3456;

fn mode(path: &Path, mode: u32) -> Result<()> {
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let stat = fs::symlink_metadata(path)?;
    Ok((stat.uid(), stat.gid()))
}

fn owners(dir: &Path) -> Result<()> {
    mode(dir, 0o777)?;
    as_user(USER, GROUP, &[], || {
        fs::write(dir.join("file"), "x")?;
        fs::create_dir(dir.join("dir"))?;
        symlink("x", dir.join("link"))?;
        nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o600))?;
        refused_io(chown(dir.join("file"), Some(OTHER), None), Errno::EPERM)?;
        refused_io(chown(dir.join("file"), None, Some(OTHER)), Errno::EPERM)
    })?;
    for name in ["file", "dir", "link", "fifo"] {
        let found = owner(&dir.join(name))?;
        ensure!(found == (USER, GROUP), "{name} is of {found:?}");
    }
    chown(dir.join("file"), Some(OTHER), None)?;
    ensure!(owner(&dir.join("file"))? == (OTHER, GROUP));
    std::os::unix::fs::lchown(dir.join("link"), Some(0), Some(0))?;
    ensure!(owner(&dir.join("link"))? == (0, 0));
    Ok(())
}

fn permissions(dir: &Path) -> Result<()> {
    mode(dir, 0o755)?;
    let file = dir.join("file");
    fs::write(&file, "x")?;
    mode(&file, 0o600)?;
    as_user(USER, GROUP, &[], || {
        refused_io(File::open(&file), Errno::EACCES)?;
        refused_io(fs::write(dir.join("new"), "x"), Errno::EACCES)?;
        refused_io(fs::remove_file(&file), Errno::EACCES)?;
        refused_io(fs::set_permissions(&file, fs::Permissions::from_mode(0o777)), Errno::EPERM)
    })?;
    mode(&file, 0o604)?;
    as_user(USER, GROUP, &[], || {
        fs::read(&file)?;
        refused_io(File::options().append(true).open(&file), Errno::EACCES)
    })?;
    fs::create_dir(dir.join("closed"))?;
    fs::write(dir.join("closed/inside"), "x")?;
    mode(&dir.join("closed"), 0o700)?;
    as_user(USER, GROUP, &[], || refused_io(fs::metadata(dir.join("closed/inside")), Errno::EACCES))
}

fn groups(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    fs::write(&file, "x")?;
    chown(&file, Some(0), Some(OTHER))?;
    mode(&file, 0o060)?;
    as_user(USER, GROUP, &[OTHER], || Ok(File::options().append(true).open(&file)?.write_all(b"y")?))?;
    as_user(USER, GROUP, &[], || refused_io(File::open(&file), Errno::EACCES))
}

fn setgid_directory(dir: &Path) -> Result<()> {
    chown(dir, Some(0), Some(OTHER))?;
    mode(dir, 0o2777)?;
    as_user(USER, GROUP, &[], || {
        fs::write(dir.join("file"), "x")?;
        Ok(fs::create_dir(dir.join("below"))?)
    })?;
    ensure!(owner(&dir.join("file"))? == (USER, OTHER) && owner(&dir.join("below"))? == (USER, OTHER));
    ensure!(fs::metadata(dir.join("below"))?.mode() & 0o7777 == 0o2755);
    Ok(())
}

fn sticky(dir: &Path) -> Result<()> {
    mode(dir, 0o1777)?;
    as_user(USER, GROUP, &[], || {
        fs::write(dir.join("file"), "x")?;
        Ok(fs::write(dir.join("mine"), "x")?)
    })?;
    as_user(OTHER, GROUP, &[], || {
        refused_io(fs::remove_file(dir.join("file")), Errno::EPERM)?;
        refused_io(fs::rename(dir.join("file"), dir.join("new")), Errno::EPERM)
    })?;
    as_user(USER, GROUP, &[], || Ok(fs::remove_file(dir.join("mine"))?))
}

fn set_id_bits(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    let bits = || Ok::<_, anyhow::Error>(fs::metadata(&file)?.mode() & 0o7777);
    fs::write(&file, "x")?;
    mode(&file, 0o6777)?;
    as_user(USER, GROUP, &[], || Ok(File::options().append(true).open(&file)?.write_all(b"y")?))?;
    ensure!(bits()? == 0o777, "after a write {:o}", bits()?);
    mode(&file, 0o6777)?;
    as_user(USER, GROUP, &[], || Ok(File::options().write(true).open(&file)?.set_len(0)?))?;
    ensure!(bits()? == 0o777, "after a truncation {:o}", bits()?);
    mode(&file, 0o6777)?;
    as_user(USER, GROUP, &[], || Ok(File::options().write(true).truncate(true).open(&file).map(drop)?))?;
    ensure!(bits()? == 0o777, "after an open that truncates {:o}", bits()?);
    mode(&file, 0o6777)?;
    File::options().append(true).open(&file)?.write_all(b"root may")?;
    ensure!(bits()? == 0o6777, "after root's write {:o}", bits()?);
    chown(&file, Some(USER), Some(GROUP))?;
    ensure!(bits()? == 0o777, "after a change of owner {:o}", bits()?);
    Ok(())
}

fn c(path: &Path) -> Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn set(path: &Path, name: &str, value: &[u8], flags: i32) -> Result<nix::Result<()>> {
    let (path, name) = (c(path)?, CString::new(name)?);
    // SAFETY: both are C strings, and the value is as long as said.
    let result =
        unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) };
    Ok(Errno::result(result).map(drop))
}

fn get(path: &Path, name: &str, room: usize) -> Result<nix::Result<Vec<u8>>> {
    let (path, name) = (c(path)?, CString::new(name)?);
    let mut value = vec![0; room];
    // SAFETY: both are C strings, and the buffer is as long as said.
    let len = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), room) };
    Ok(Errno::result(len).map(|len| {
        value.truncate(usize::try_from(len).unwrap_or(0));
        value
    }))
}

fn list(path: &Path) -> Result<Vec<String>> {
    let path = c(path)?;
    let mut names = vec![0u8; 4096];
    // SAFETY: a C string, and the buffer is as long as said.
    let len = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(Errno::result(len)?)?);
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| String::from_utf8_lossy(name).into_owned()).collect())
}

fn remove(path: &Path, name: &str) -> Result<nix::Result<()>> {
    let (path, name) = (c(path)?, CString::new(name)?);
    // SAFETY: both are C strings.
    Ok(Errno::result(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) }).map(drop))
}

fn xattrs(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    fs::write(&file, "x")?;
    ensure!(list(&file)?.is_empty(), "{:?}", list(&file)?);
    set(&file, "user.one", b"1", 0)??;
    set(&file, "user.two", b"", libc::XATTR_CREATE)??;
    refused(set(&file, "user.one", b"2", libc::XATTR_CREATE)?, Errno::EEXIST)?;
    refused(set(&file, "user.none", b"2", libc::XATTR_REPLACE)?, Errno::ENODATA)?;
    set(&file, "user.one", &[5; 2000], libc::XATTR_REPLACE)??;
    ensure!(get(&file, "user.one", 4096)?? == [5; 2000] && get(&file, "user.two", 10)?? == b"");
    refused(get(&file, "user.one", 1999)?, Errno::ERANGE)?;
    refused(get(&file, "user.none", 10)?, Errno::ENODATA)?;
    let mut names = list(&file)?;
    names.sort();
    ensure!(names == ["user.one", "user.two"], "{names:?}");
    remove(&file, "user.one")??;
    refused(remove(&file, "user.one")?, Errno::ENODATA)?;
    ensure!(list(&file)? == ["user.two"]);
    set(dir, "user.of-a-directory", b"x", 0)??;
    ensure!(get(dir, "user.of-a-directory", 10)?? == b"x");
    mode(&file, 0o600)?;
    as_user(USER, GROUP, &[], || refused(get(&file, "user.two", 10)?, Errno::EACCES))
}

fn link_xattrs(dir: &Path) -> Result<()> {
    symlink("x", dir.join("link"))?;
    refused(set(&dir.join("link"), "user.x", b"x", 0)?, Errno::EPERM)?;
    refused(get(&dir.join("link"), "user.x", 10)?, Errno::EPERM).or_else(|_| {
        // Which of the two it is depends on the kernel.
        refused(get(&dir.join("link"), "user.x", 10)?, Errno::ENODATA)
    })
}

/// `struct posix_acl_xattr_header` and its entries: tag, permissions, id.
fn acl_value(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

const NOBODY: u32 = u32::MAX;
const USER_OBJ: u16 = 1;
const USER_ENTRY: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP_ENTRY: u16 = 8;
const MASK: u16 = 16;
const OTHERS: u16 = 32;

fn acl(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    fs::write(&file, "x")?;
    mode(&file, 0o600)?;
    let entries = [
        (USER_OBJ, 6, NOBODY),
        (USER_ENTRY, 6, USER),
        (GROUP_OBJ, 0, NOBODY),
        (GROUP_ENTRY, 4, OTHER),
        (MASK, 6, NOBODY),
        (OTHERS, 0, NOBODY),
    ];
    set(&file, "system.posix_acl_access", &acl_value(&entries), 0)??;
    ensure!(get(&file, "system.posix_acl_access", 100)?? == acl_value(&entries));
    ensure!(fs::metadata(&file)?.mode() & 0o777 == 0o660, "the mask is the mode's group");
    let append = || File::options().append(true).open(&file);
    as_user(USER, 9, &[], || Ok(append()?.write_all(b"y")?))?;
    as_user(9, 9, &[OTHER], || {
        fs::read(&file)?;
        refused_io(append(), Errno::EACCES)
    })?;
    as_user(9, 9, &[], || refused_io(File::open(&file), Errno::EACCES))?;
    mode(&file, 0o640)?;
    as_user(USER, 9, &[], || {
        fs::read(&file)?;
        refused_io(append(), Errno::EACCES)
    })?;
    remove(&file, "system.posix_acl_access")??;
    as_user(USER, 9, &[], || refused_io(File::open(&file), Errno::EACCES))
}

fn default_acl(dir: &Path) -> Result<()> {
    let entries = [
        (USER_OBJ, 7, NOBODY),
        (USER_ENTRY, 7, USER),
        (GROUP_OBJ, 5, NOBODY),
        (MASK, 7, NOBODY),
        (OTHERS, 0, NOBODY),
    ];
    set(dir, "system.posix_acl_default", &acl_value(&entries), 0)??;
    // Instead of the umask, which would take away the group's writing.
    fs::write(dir.join("file"), "x")?;
    let bits = fs::metadata(dir.join("file"))?.mode() & 0o777;
    ensure!(bits == 0o660, "{bits:o}");
    fs::create_dir(dir.join("below"))?;
    let bits = fs::metadata(dir.join("below"))?.mode() & 0o777;
    ensure!(bits == 0o770, "{bits:o}");
    ensure!(get(&dir.join("below"), "system.posix_acl_default", 100)?? == acl_value(&entries), "inherited");
    mode(dir, 0o755)?;
    as_user(USER, 9, &[], || Ok(File::options().append(true).open(dir.join("file"))?.write_all(b"y")?))?;
    as_user(9, 9, &[], || refused_io(File::open(dir.join("file")), Errno::EACCES))
}

/// What `setcap cap_net_raw+ep` writes (`struct vfs_cap_data`, revision 2).
fn file_capabilities(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    fs::write(&file, "x")?;
    let value: Vec<u8> = [0x0200_0001u32, 1 << 13, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    set(&file, "security.capability", &value, 0)??;
    ensure!(get(&file, "security.capability", 100)?? == value);
    File::options().append(true).open(&file)?.write_all(b"changed")?;
    refused(get(&file, "security.capability", 100)?, Errno::ENODATA)
}
