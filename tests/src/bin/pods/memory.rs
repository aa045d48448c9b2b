//! Where the memory of an idle pod is: in which mappings of its processes, where in guest memory, and for what in the
//! guest.

use std::{fs::File, ops::Range, os::unix::fs::FileExt};

use anyhow::{Context, Result};
use caisson_e2e::{cost, cri::Cri, node::Node};
use procfs::process::{MemoryMap, Process};

/// What the start needed and no longer uses goes back within this time.
pub(crate) const REST: std::time::Duration = std::time::Duration::from_secs(5);
/// What is asked inside, of a guest's kernel.
const FILES: [&str; 4] = ["/proc/meminfo", "/proc/buddyinfo", "/proc/vmallocinfo", "/proc/zoneinfo"];
/// A mapping with less is not worth its line.
const WORTH_KIB: u64 = 8;
const PAGE_KIB: u64 = 4;
/// Pages of 4 KiB in a huge one.
const HUGE: u64 = 512;
/// The bit of an entry in `/proc/PID/pagemap` that says that the page is in memory.
const PRESENT: u64 = 1 << 63;

/// Starts a pod, lets it come to rest, prints.
///
/// # Errors
/// When the pod fails or `/proc` can't be read.
pub(crate) async fn run() -> Result<()> {
    let node = Node::ready()?;
    let mut cri = Cri::connect(node.socket()).await?;
    // It warms up the caches that all pods share.
    cost::a_pods_life(&mut cri, "warm", "caisson").await?;
    let (pod, container, _) = cost::start_pod(&mut cri, "memory", "caisson").await?;
    tokio::time::sleep(REST).await;
    for (name, pid) in cost::processes()? {
        show_process(name, pid)?;
    }
    show_guest(&mut cri, &container).await?;
    for line in node.containerd_log().lines().filter(|line| line.contains(" ms (")) {
        println!("{line}");
    }
    cri.remove_pod(&pod).await
}

async fn show_guest(cri: &mut Cri, container: &str) -> Result<()> {
    for file in FILES {
        println!("== {file} in the guest");
        println!("{}", cri.said(container, &format!("cat {file}")).await?);
    }
    Ok(())
}

fn show_process(name: &str, pid: u32) -> Result<()> {
    let maps = Process::new(pid.cast_signed()).and_then(|process| process.smaps());
    let mappings = maps.with_context(|| format!("reading the mappings of {name}"))?.0;
    let sum = |field| mappings.iter().map(|of| kib(of, field)).sum::<u64>();
    println!("== {name}: PSS {} KiB, RSS {} KiB", sum("Pss"), sum("Rss"));
    println!("{:>9} {:>9} {:>9} {:>9} {:>9}  mapping", "size", "rss", "pss", "anonymous", "huge");
    for mapping in mappings.iter().filter(|mapping| kib(mapping, "Rss") >= WORTH_KIB) {
        for field in ["Size", "Rss", "Pss", "Anonymous", "AnonHugePages"] {
            print!("{:>9} ", kib(mapping, field));
        }
        println!(" {} {:?}", mapping.perms.as_str(), mapping.pathname);
    }
    guest_memory(&mappings).map_or(Ok(()), |memory| show_pages(pid, memory))
}

fn kib(mapping: &MemoryMap, field: &str) -> u64 {
    mapping.extension.map.get(field).copied().unwrap_or_default() / 1024
}

/// The guest's memory: the largest mapping, and those that touch it. It is split where huge pages were.
fn guest_memory(mappings: &[MemoryMap]) -> Option<Range<u64>> {
    let joined = mappings.chunk_by(|a, b| a.address.1 == b.address.0 && a.pathname == b.pathname);
    let ranges = joined.filter_map(|run| Some(run.first()?.address.0..run.last()?.address.1));
    // What is smaller is no guest's.
    ranges.max_by_key(|range| range.end - range.start).filter(|range| range.end - range.start > 64 << 20)
}

/// How much of each 2 MiB of the guest's memory is there.
fn show_pages(pid: u32, memory: Range<u64>) -> Result<()> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).context("opening its page map")?;
    println!("KiB present in each 2 MiB of the guest's memory:");
    let pages = (memory.end - memory.start) / 4096;
    for block in (0..pages).step_by(usize::try_from(HUGE)?) {
        let mut entries = vec![0; usize::try_from(HUGE.min(pages - block))? * 8];
        pagemap.read_exact_at(&mut entries, (memory.start / 4096 + block) * 8)?;
        let (words, _) = entries.as_chunks::<8>();
        let present = words.iter().filter(|word| u64::from_le_bytes(**word) & PRESENT != 0).count();
        if present > 0 {
            println!("  {:#010x} {:>5}", block * 4096, u64::try_from(present)? * PAGE_KIB);
        }
    }
    Ok(())
}
