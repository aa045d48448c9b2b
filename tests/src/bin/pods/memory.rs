//! Where the memory of an idle pod is: in which mappings of its processes, where in guest memory, and for what in the
//! guest.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use anyhow::{Context, Result};
use caisson_e2e::{cost, cri::Cri, node::Node};

/// What the start needed and no longer uses goes back within this time.
pub(crate) const REST: std::time::Duration = std::time::Duration::from_secs(5);
/// What is asked inside, of a guest's kernel.
const FILES: [&str; 4] = ["/proc/meminfo", "/proc/buddyinfo", "/proc/vmallocinfo", "/proc/zoneinfo"];
/// A mapping with less is not worth its line.
const WORTH_KIB: u64 = 100;
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

#[derive(Default)]
struct Mapping {
    name: String,
    start: u64,
    end: u64,
    rss: u64,
    pss: u64,
    anonymous: u64,
    huge: u64,
}

fn show_process(name: &str, pid: u32) -> Result<()> {
    let mappings = mappings(pid)?;
    let sum = |field: fn(&Mapping) -> u64| mappings.iter().map(field).sum::<u64>();
    println!("== {name}: PSS {} KiB, RSS {} KiB", sum(|of| of.pss), sum(|of| of.rss));
    println!("{:>9} {:>9} {:>9} {:>9} {:>9}  mapping", "size", "rss", "pss", "anonymous", "huge");
    for mapping in mappings.iter().filter(|mapping| mapping.rss >= WORTH_KIB) {
        let size = (mapping.end - mapping.start) / 1024;
        let Mapping { rss, pss, anonymous, huge, name, .. } = mapping;
        println!("{size:>9} {rss:>9} {pss:>9} {anonymous:>9} {huge:>9}  {name}");
    }
    guest_memory(&mappings).map_or(Ok(()), |memory| show_pages(pid, memory))
}

/// The guest's memory: the largest mapping, and those that touch it. It is split where huge pages were.
fn guest_memory(mappings: &[Mapping]) -> Option<Mapping> {
    let joined = mappings.chunk_by(|a, b| a.end == b.start && a.name == b.name);
    let largest = joined.max_by_key(|run| run.iter().map(|of| of.end - of.start).sum::<u64>())?;
    let (first, last) = (largest.first()?, largest.last()?);
    // What is smaller is no guest's.
    (last.end - first.start > 64 << 20).then(|| Mapping {
        start: first.start,
        end: last.end,
        ..Mapping::default()
    })
}

/// How much of each 2 MiB of the guest's memory is there.
fn show_pages(pid: u32, mapping: Mapping) -> Result<()> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).context("opening its page map")?;
    println!("KiB present in each 2 MiB of the guest's memory:");
    let pages = (mapping.end - mapping.start) / 4096;
    for block in (0..pages).step_by(usize::try_from(HUGE)?) {
        let mut entries = vec![0; usize::try_from(HUGE.min(pages - block))? * 8];
        pagemap.read_exact_at(&mut entries, (mapping.start / 4096 + block) * 8)?;
        let (words, _) = entries.as_chunks::<8>();
        let present = words.iter().filter(|word| u64::from_le_bytes(**word) & PRESENT != 0).count();
        if present > 0 {
            println!("  {:#010x} {:>5}", block * 4096, u64::try_from(present)? * PAGE_KIB);
        }
    }
    Ok(())
}

fn mappings(pid: u32) -> Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let hex = |text| u64::from_str_radix(text, 16).unwrap_or_default();
            let permissions = words.next().unwrap_or_default();
            // Offset, device and inode come before the file, if there is one.
            let name = format!("{permissions} {}", words.nth(3).unwrap_or_default());
            mappings.push(Mapping { name, start: hex(start), end: hex(end), ..Mapping::default() });
        } else if let Some(mapping) = mappings.last_mut() {
            let kib = words.next().and_then(|word| word.parse().ok()).unwrap_or_default();
            match first {
                "Rss:" => mapping.rss = kib,
                "Pss:" => mapping.pss = kib,
                "Anonymous:" => mapping.anonymous = kib,
                "AnonHugePages:" => mapping.huge = kib,
                _ => {}
            }
        }
    }
    Ok(mappings)
}
