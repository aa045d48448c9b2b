//! The guests that are measured.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail, ensure};

use crate::initramfs::Archive;

/// What the measured guests say on their console when they have got where they are to get.
pub(super) const MARK: u8 = b'@';

/// The base address of the init below.
const BASE: u64 = 0x40_0000;
/// Bytes of an ELF header and one program header.
const HEADERS: u64 = 64 + 56;

/// x86-64: write(1, "@", 1), then pause() for ever.
const INIT: [u8; 38] = [
    0xb8, 1, 0, 0, 0, // mov eax, SYS_write
    0xbf, 1, 0, 0, 0, // mov edi, 1
    0x48, 0x8d, 0x35, 20, 0, 0, 0, // lea rsi, [rip + 20]
    0xba, 1, 0, 0, 0, // mov edx, 1
    0x0f, 0x05, // syscall
    0xb8, 34, 0, 0, 0, // mov eax, SYS_pause
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp to the mov
    0x90, 0x90, 0x90, 0x90, MARK,
];

/// x86, 32 or 64 bits: write the mark to the first serial port, then halt for ever.
const ENTRY: [u8; 10] = [
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, MARK, // mov al, MARK
    0xee, // out dx, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];

/// An init without libraries, as an ELF image of one segment.
fn init() -> Vec<u8> {
    let size = HEADERS + INIT.len() as u64;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| image.extend_from_slice(bytes);
    put(&2u16.to_le_bytes()); // ET_EXEC
    put(&62u16.to_le_bytes()); // EM_X86_64
    put(&1u32.to_le_bytes());
    put(&(BASE + HEADERS).to_le_bytes()); // entry
    put(&64u64.to_le_bytes()); // program headers
    put(&[0; 12]); // section headers, flags
    for half in [64u16, 56, 1, 0, 0, 0] {
        put(&half.to_le_bytes());
    }
    put(&1u32.to_le_bytes()); // PT_LOAD
    put(&5u32.to_le_bytes()); // R, X
    for word in [0, BASE, BASE, size, size, 0x1000] {
        put(&u64::to_le_bytes(word));
    }
    put(&INIT);
    image
}

/// An initramfs that is nothing but [`init`].
pub(super) fn minimal_initramfs() -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    archive.directory("dev")?;
    archive.character_device("dev/console", 5, 1)?;
    archive.file("init", 0o755, &init())?;
    archive.finish().context("writing the small initramfs")
}

/// An initramfs with a shell, the tools that the throughput guest uses, and its script.
pub(super) fn system_initramfs(script: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for directory in ["dev", "proc", "sys", "bin"] {
        archive.directory(directory)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox").context("reading the static busybox")?)?;
    for applet in ["sh", "mount", "ip", "nc", "ping", "cat", "sleep", "mkdir", "insmod", "seq"] {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    let mut present = vec!["dev".to_owned(), "proc".to_owned(), "sys".to_owned(), "bin".to_owned()];
    // busybox's dd has no O_DIRECT, and its nc no vsock.
    with_libraries(&mut archive, Path::new("/usr/bin/dd"), "bin/dd", &mut present)?;
    let own = std::env::current_exe().context("finding xtask's own binary")?;
    with_libraries(&mut archive, &own, "bin/xtask", &mut present)?;
    archive.file("init", 0o755, format!("#!/bin/sh\n{script}").as_bytes())?;
    archive.finish().context("writing the initramfs")
}

/// Adds a program and the libraries that it needs; `present` has the paths that the archive has already.
fn with_libraries(
    archive: &mut Archive<Vec<u8>>,
    program: &Path,
    to: &str,
    present: &mut Vec<String>,
) -> Result<()> {
    archive.file(to, 0o755, &fs::read(program).with_context(|| format!("reading {}", program.display()))?)?;
    let listed = Command::new("ldd").arg(program).output().context("running ldd")?;
    ensure!(listed.status.success(), "ldd {} failed", program.display());
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for library in listed.split_whitespace().filter(|word| word.starts_with('/')) {
        let mut parent = String::new();
        let (above, _) = library.trim_start_matches('/').rsplit_once('/').unwrap_or_default();
        for part in above.split('/') {
            parent = if parent.is_empty() { part.to_owned() } else { format!("{parent}/{part}") };
            if !present.contains(&parent) {
                archive.directory(&parent)?;
                present.push(parent.clone());
            }
        }
        let path = library.trim_start_matches('/').to_owned();
        if !present.contains(&path) {
            let contents = fs::read(library).with_context(|| format!("reading {library}"))?;
            archive.file(&path, 0o755, &contents)?;
            present.push(path);
        }
    }
    Ok(())
}

/// The kernel, but at each of its entry points it says that it was entered, and stops: what is left of a boot
/// is the VMM's own share, with an image of the same size.
pub(super) fn stopped_kernel(kernel: &[u8]) -> Result<Vec<u8>> {
    let mut image = kernel.to_vec();
    let entry = word(kernel, 24)?;
    let mut entries = vec![entry];
    for header in program_headers(kernel)? {
        if header.kind == 4 {
            entries.extend(pvh_entry(kernel, &header));
        }
    }
    for entry in entries {
        let segments = program_headers(kernel)?;
        let place = segments
            .iter()
            .filter(|header| header.kind == 1)
            .find_map(|header| {
                let within = entry.checked_sub(header.physical).filter(|&within| within < header.size)?;
                usize::try_from(header.offset + within).ok()
            })
            .context("the kernel's entry is in none of its segments")?;
        image
            .get_mut(place..place + ENTRY.len())
            .context("the kernel ends at its entry")?
            .copy_from_slice(&ENTRY);
    }
    Ok(image)
}

struct ProgramHeader {
    kind: u32,
    offset: u64,
    physical: u64,
    size: u64,
}

fn word(image: &[u8], at: usize) -> Result<u64> {
    let bytes = image.get(at..at + 8).context("the kernel is cut short")?;
    Ok(u64::from_le_bytes(bytes.try_into()?))
}

fn program_headers(image: &[u8]) -> Result<Vec<ProgramHeader>> {
    if image.get(..5) != Some(b"\x7fELF\x02".as_slice()) {
        bail!("the kernel is not a 64-bit ELF image");
    }
    let table = usize::try_from(word(image, 32)?)?;
    let count = u16::from_le_bytes(image.get(56..58).context("cut short")?.try_into()?);
    (0..usize::from(count))
        .map(|index| {
            let at = table + 56 * index;
            Ok(ProgramHeader {
                kind: u32::try_from(word(image, at)? & 0xffff_ffff)?,
                offset: word(image, at + 8)?,
                physical: word(image, at + 24)?,
                size: word(image, at + 32)?,
            })
        })
        .collect()
}

/// The entry that XEN_ELFNOTE_PHYS32_ENTRY (18) names: where QEMU starts a kernel.
fn pvh_entry(image: &[u8], notes: &ProgramHeader) -> Option<u64> {
    let from = usize::try_from(notes.offset).ok()?;
    let mut rest = image.get(from..from + usize::try_from(notes.size).ok()?)?;
    loop {
        let field = |at: usize| Some(u32::from_le_bytes(rest.get(at..at + 4)?.try_into().ok()?));
        let (name, description, kind) = (field(0)?, field(4)?, field(8)?);
        let description_at = 12 + usize::try_from(name).ok()?.next_multiple_of(4);
        if kind == 18 && rest.get(12..16)? == b"Xen\0" {
            return field(description_at).map(u64::from);
        }
        rest = rest.get(description_at + usize::try_from(description).ok()?.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_init_runs_and_speaks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("init");
        fs::write(&path, init()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(&path).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut said = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
        assert_eq!(said, [MARK]);
        assert!(child.try_wait().unwrap().is_none(), "it waits");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_kernel_is_stopped_at_its_entry() {
        let mut kernel = init();
        kernel.resize(0x400, 0);
        let stopped = stopped_kernel(&kernel).unwrap();
        let entry = usize::try_from(HEADERS).unwrap();
        assert_eq!(stopped[entry..entry + ENTRY.len()], ENTRY);
        assert!(stopped_kernel(b"no kernel").is_err());
    }
}
