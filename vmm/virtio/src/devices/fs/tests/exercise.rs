//! All that workers do, for the test of the system call filter that they have in a jail.

use super::bench::*;
use crate::ThreadSetup;

/// Has workers that begin with `setup` serve every kind of request. A filter that lacks one of their calls ends the
/// process.
///
/// # Panics
/// When a request is not answered as it should be.
pub fn exercise_workers(setup: ThreadSetup) {
    files(&mut Bench::confined(setup));
    contents(&mut Bench::confined(setup));
}

fn files(bench: &mut Bench) {
    bench.caller = (bench.caller.0 + 1, bench.caller.1 + 1);
    let _ = bench.create("other", 0o600, 0);
    bench.caller = own();
    let file = bench.create("file", 0o600, 0o22).unwrap();
    bench.write(file, 0, 4, b"data").unwrap();
    assert_eq!(bench.read(file, 0, 9).unwrap(), b"data");
    bench.setattr(file.0, 1 | 1 << 3 | 1 << 5, &[(68, 0o640), (16, 2)]).unwrap();
    bench.setattr(file.0, 1 << 1 | 1 << 2, &[(76, own().0.into()), (80, own().1.into())]).unwrap();
    bench.set_xattr(file.0, "user.a", b"x").unwrap();
    bench.get_xattr(file.0, "user.a", 9).unwrap();
    bench.call(23, file.0, &words(&[100, 0])).unwrap();
    bench.call(24, file.0, &text("user.a")).unwrap();
    bench.mknod("fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    bench.call(6, ROOT, &[text("link"), text("target")].concat()).unwrap();
    let link = bench.lookup(ROOT, "link").unwrap();
    bench.call(5, link, &[]).unwrap();
    bench.call(9, ROOT, &[words(&[0o700, 0]), text("dir")].concat()).unwrap();
    bench.call(13, ROOT, &[file.0.to_le_bytes().to_vec(), text("hard")].concat()).unwrap();
    bench.rename("hard", "harder", libc::RENAME_NOREPLACE).unwrap();
    bench.call(10, ROOT, &text("harder")).unwrap();
    bench.call(11, ROOT, &text("dir")).unwrap();
    names(bench, ROOT, 4096, true);
    bench.call(17, ROOT, &[]).unwrap();
    let handle = file.1.to_le_bytes();
    for data_only in [0, 1] {
        bench.call(20, file.0, &[&handle[..], &words(&[data_only, 0])].concat()).unwrap();
    }
    bench.call(25, file.0, &[&handle[..], &[0; 16]].concat()).unwrap();
    let body = [&handle[..], &[0; 8], &4096u64.to_le_bytes(), &[0; 8]].concat();
    bench.call(43, file.0, &body).unwrap();
    bench.call(46, file.0, &[&handle[..], &[0; 8], &words(&[4, 0])].concat()).unwrap();
    bench.call(34, file.0, &words(&[4, 0])).unwrap();
    bench.release(file).unwrap();
    bench.call(38, 0, &[]).unwrap();
    assert_eq!(bench.fs.share.held(), (0, 0));
}

fn contents(bench: &mut Bench) {
    let (from, to) = two_files(bench);
    bench.call(47, from.0, &copy_in((from.1, 0), to, 9, 0)).unwrap();
    unnamed(bench, ROOT, 0).unwrap();
    bench.call(50, ROOT, &[0; 8]).unwrap();
    bench.call(52, from.0, &statx_in(libc::STATX_BTIME)).unwrap();
}

#[test]
fn workers_serve_every_kind_of_request() {
    exercise_workers(|| {});
}
