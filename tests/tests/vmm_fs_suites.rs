//! What file systems are tested with elsewhere, on a share in a jailed guest, held against this machine's own
//! file system. A worker's filter kills on a call that it does not know, so this is also what shows that none
//! is missing.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    guest_share::{Script, compare},
    node::Product,
};

/// Runs a script here and there.
fn both(script: &Script<'_>, exception: impl Fn(&str) -> Option<&'static str>) -> Result<()> {
    let here = script.run_here()?;
    let there = script.run_in_guest()?;
    compare(&here, &there, exception)
}

fn none(_: &str) -> Option<&'static str> {
    None
}

/// The program of the whole-system tests that has the cases.
fn own_cases() -> Result<PathBuf> {
    let path = std::env::var_os("NEXTEST_BIN_EXE_fs-cases").context("nextest names no fs-cases")?;
    Ok(PathBuf::from(path))
}

#[test]
fn a_share_does_what_programs_expect_of_a_file_system() -> Result<()> {
    let programs = [(own_cases()?, "fs-cases")];
    let script = Script { text: "exec $BIN/fs-cases $DIR", programs: &programs, ..Script::default() };
    both(&script, |name| match name {
        "device" => Some("device nodes of the host are not to be had"),
        "set_id_bits_go" => {
            Some("in a user namespace the host's kernel takes these bits from root's writes, too")
        }
        _ => None,
    })
}

/// Users that every Debian has, and all optional features that Linux's own file systems have.
const PJDFSTEST: &str = "
cat > $TMPDIR/config <<END
[features]
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
[dummy_auth]
entries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]
END
$BIN/pjdfstest -c $TMPDIR/config -p $DIR -s $TMPDIR";

/// Those of its cases whose names have one of these in them.
fn pjdfstest(patterns: &[&str]) -> Result<()> {
    let programs = [(Product::Suite("pjdfstest").path()?, "pjdfstest")];
    let text = format!("{PJDFSTEST} {}", patterns.join(" "));
    let patience = Duration::from_secs(900);
    both(&Script { text: &text, programs: &programs, patience, ..Script::default() }, |name| {
        if name.contains("::block") {
            return Some("device nodes of the host are not to be had");
        }
        (name == "link::link_count_max").then_some("the C library knows no such limit of FUSE")
    })
}

#[test]
fn a_share_passes_what_is_hardest_of_pjdfstest() -> Result<()> {
    pjdfstest(&["rename", "utimensat", "posix_fallocate"])
}

#[test]
#[ignore = "a soak"]
fn a_share_passes_pjdfstest() -> Result<()> {
    pjdfstest(&[])
}

/// `fsx`, once for each seed, with all operations that it has.
fn fsx(seeds: std::ops::Range<u32>, operations: u32) -> String {
    format!(
        "
cat > $TMPDIR/config <<END
flen = 1048576
[opsize]
max = 131072
[weights]
close_open = 1
invalidate = 1
mapread = 5
mapwrite = 5
read = 10
write = 10
truncate = 3
fsync = 0.5
fdatasync = 0.5
posix_fallocate = 2
punch_hole = 2
sendfile = 3
posix_fadvise = 1
copy_file_range = 3
END
for seed in $(seq {} {}); do
  if $BIN/fsx -N {operations} -S $seed -f $TMPDIR/config -P $TMPDIR $DIR/fsx > $TMPDIR/log 2>&1
  then echo seed-$seed ok
  else echo seed-$seed FAILED; tail -n 12 $TMPDIR/log | sed 's/^/ /'
  fi
done",
        seeds.start,
        seeds.end - 1
    )
}

#[test]
fn a_share_passes_fsx() -> Result<()> {
    let programs = [(Product::Suite("fsx").path()?, "fsx")];
    let text = fsx(1..3, 500);
    both(&Script { text: &text, programs: &programs, ..Script::default() }, none)
}

#[test]
#[ignore = "a soak"]
fn a_share_passes_fsx_for_long() -> Result<()> {
    let programs = [(Product::Suite("fsx").path()?, "fsx")];
    let text = fsx(100..140, 5_000);
    let patience = Duration::from_secs(7200);
    both(&Script { text: &text, programs: &programs, patience, ..Script::default() }, none)
}

/// Those stressors of stress-ng that are about files.
const STRESSORS: &[&str] = &[
    "access",
    "acl",
    "chattr",
    "chdir",
    "chmod",
    "chown",
    "copy-file",
    "dentry",
    "dir",
    "dirdeep",
    "dirmany",
    "fallocate",
    "fcntl",
    "fiemap",
    "file-ioctl",
    "filename",
    "flock",
    "fpunch",
    "fsize",
    "fstat",
    "getdent",
    "hdd",
    "inode-flags",
    "inotify",
    "io",
    "iomix",
    "lease",
    "link",
    "locka",
    "lockf",
    "lockmix",
    "lockofd",
    "metamix",
    "mknod",
    "mmap",
    "mmapfork",
    "open",
    "readahead",
    "rename",
    "revio",
    "seek",
    "sendfile",
    "splice",
    "symlink",
    "sync-file",
    "touch",
    "unlink",
    "utime",
    "vm-splice",
    "xattr",
];

/// A few of them, one for each kind of thing that a share does, and none that makes thousands of files before it
/// looks at the time.
const FEW: &[&str] = &["acl", "dentry", "fallocate", "getdent", "lockf", "mmap", "rename", "xattr"];

/// Runs each for so many seconds.
fn stress(stressors: &[&str], seconds: u32) -> String {
    format!(
        "
mkdir -p $DIR/stress
cd $DIR/stress
for name in {}; do
  timeout -s KILL {} $BIN/stress-ng --$name 1 --timeout {seconds} --verify --temp-path $DIR/stress \\
    --hdd-bytes 4m --iomix-bytes 4m --fallocate-bytes 8m --readahead-bytes 4m --revio-bytes 4m --seek-size 4m \\
    --sync-file-bytes 4m --mmap-file --mmap-bytes 4m --sendfile-size 1m --dentries 64 \\
    > $TMPDIR/log 2>&1
  case $? in
    0) echo $name ok;;
    3|4) echo $name skipped;;
    *) echo $name FAILED; tail -n 12 $TMPDIR/log | sed 's/^/ /';;
  esac
  rm -rf $DIR/stress/*
done",
        stressors.join(" "),
        // Some look at the time only after thousands of files.
        10 * seconds + 60,
    )
}

fn stress_ng() -> [(PathBuf, &'static str); 1] {
    [("/usr/bin/stress-ng".into(), "stress-ng")]
}

#[test]
fn a_share_stands_stress() -> Result<()> {
    let text = stress(FEW, 1);
    both(&Script { text: &text, programs: &stress_ng(), ..Script::default() }, none)
}

#[test]
#[ignore = "a soak"]
fn a_share_stands_all_stress() -> Result<()> {
    let text = stress(STRESSORS, 10);
    let patience = Duration::from_secs(2 * 3600);
    both(&Script { text: &text, programs: &stress_ng(), patience, ..Script::default() }, none)
}

/// A guest that writes more than its jail lets it gets an error, and costs the machine nothing.
#[test]
fn a_file_grows_as_long_as_the_jail_lets_it() -> Result<()> {
    let script = Script {
        text: "
dd if=/dev/zero of=$DIR/file bs=1M count=12 2>&1 | grep -i large && echo too-large ok
truncate -s 100M $DIR/file 2>/dev/null || echo truncate ok
stat -c %s $DIR/file
echo still-there > $DIR/after && echo after ok",
        jail: "max_file_size = 8388608\n",
        ..Script::default()
    };
    let report = script.run_in_guest()?;
    let cases = report.cases();
    let good = ["too-large", "truncate", "after"].iter().all(|name| cases.get(name) == Some(&"ok"));
    ensure!(good && report.lines.iter().any(|line| line == "8388608"), "{:#?}", report.lines);
    Ok(())
}

/// A guest that holds all the descriptors that it may, lets go of some when the kernel needs memory.
#[test]
fn a_guest_that_holds_too_much_is_refused_more_and_nobody_else() -> Result<()> {
    let script = Script {
        text: "
mkdir $DIR/many; cd $DIR/many
i=0; while [ $i -lt 900 ]; do echo > $i 2>/dev/null || break; i=$((i + 1)); done
echo made $i; [ $i -lt 600 ] && echo refused ok
cd /; echo 2 > /proc/sys/vm/drop_caches
echo > $DIR/after && echo after ok
ls -l $DIR/many > $TMPDIR/listed 2>/dev/null; [ $(wc -l < $TMPDIR/listed) -gt 100 ] && echo listed ok
rm -r $DIR/many; echo 2 > /proc/sys/vm/drop_caches; rm -rf $DIR/many; [ ! -e $DIR/many ] && echo removed ok",
        jail: "max_open_files = 1024\n",
        ..Script::default()
    };
    let report = script.run_in_guest()?;
    let good =
        ["refused", "after", "listed", "removed"].iter().all(|name| report.cases().get(name) == Some(&"ok"));
    ensure!(good, "{:#?}", report.lines);
    Ok(())
}
