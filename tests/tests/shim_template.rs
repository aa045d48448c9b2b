//! Pods that start from a template: from what they are made, what they have in common and what they must not.

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cri::{self, Cri, LinuxContainerResources, Pod},
    leaks::Holdings,
    templates::Templates,
};

/// What every guest has of its own: prints a word for each.
const IDENTITY: &str = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; \
    head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n'; echo; \
    sed -n 's/^\\([0-9a-f]*\\)-.*stack.*/\\1/p' /proc/self/maps";

async fn ready() -> Result<(Templates, Cri, Holdings)> {
    let (node, cri, before) = cri::ready().await?;
    Ok((Templates::new(node)?, cri, before))
}

async fn identity(cri: &mut Cri, pod: &Pod) -> Result<Vec<String>> {
    let config = cri::container_config("who", BUSYBOX_IMAGE, &["sleep", "1000"]);
    let container = cri.run_container(pod, config).await?;
    let words: Vec<_> = cri.said(&container, IDENTITY).await?.split_whitespace().map(str::to_owned).collect();
    ensure!(words.len() == 4, "{words:?}");
    Ok(words)
}

/// Runs so many clones of one template, and makes sure that no two are alike.
async fn clones_differ(count: usize) -> Result<()> {
    let (templates, mut cri, before) = ready().await?;
    templates.prepare()?;
    let already = templates.origins();
    let mut seen = BTreeSet::new();
    for number in 0..count {
        let pod = cri.run_pod(cri::pod_config(&format!("shim-clone-{number}")), "caisson").await;
        let pod = pod.with_context(|| templates.node().containerd_log())?;
        for word in identity(&mut cri, &pod).await? {
            ensure!(seen.insert(word.clone()), "two clones have {word}");
        }
        cri.remove_pod(&pod).await?;
    }
    ensure!(templates.origins() == (already.0 + count, already.1), "{:?}", templates.origins());
    drop(templates);
    before.assert_nothing_added()
}

#[tokio::test]
async fn template_clones_have_nothing_secret_in_common() -> Result<()> {
    clones_differ(3).await
}

/// ASLR has few bits in which twenty could agree by chance, but not in all of them.
#[tokio::test]
#[ignore = "takes minutes"]
async fn template_clones_have_nothing_secret_in_common_among_twenty() -> Result<()> {
    clones_differ(20).await
}

#[tokio::test]
async fn template_is_made_by_the_first_pod_and_used_by_the_next() -> Result<()> {
    let (templates, mut cri, before) = ready().await?;
    let already = templates.origins();
    let first = cri.run_pod(cri::pod_config("shim-first"), "caisson").await?;
    ensure!(templates.origins() == (already.0, already.1 + 1), "{:?}", templates.origins());
    templates.wait_for(1)?;
    let second = cri.run_pod(cri::pod_config("shim-second"), "caisson").await?;
    ensure!(templates.origins() == (already.0 + 1, already.1 + 1), "{}", templates.node().containerd_log());

    // Both are pods like any other.
    for pod in [&first, &second] {
        let config = cri::container_config("main", BUSYBOX_IMAGE, &["sleep", "1000"]);
        let container = cri.run_container(pod, config).await?;
        let said = cri.said(&container, "hostname; nproc; date +%s; ip -o -4 addr show eth0 | wc -l").await?;
        let words: Vec<_> = said.split_whitespace().collect();
        let [name, processors, seconds, addresses] = words[..] else { anyhow::bail!("{said}") };
        ensure!(processors == "1" && addresses == "1" && !name.is_empty(), "{said}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        ensure!(now.abs_diff(seconds.parse()?) < 30, "the guest's clock: {seconds}, the host's: {now}");
    }
    // Each Kubernetes namespace has its own copy.
    let mut other = cri::pod_config("shim-third");
    other.metadata.get_or_insert_default().namespace = "another".into();
    let third = cri.run_pod(other, "caisson").await?;
    let [template] = &templates.list()?[..] else { anyhow::bail!("{:?}", templates.list()?) };
    let tenants = fs::read_dir(template.join("tenants"))?.filter_map(Result::ok);
    let copies = tenants.filter(|entry| entry.path().extension().is_none()).count();
    ensure!(copies == 2, "{copies} copies for two namespaces");
    for pod in [&first, &second, &third] {
        cri.remove_pod(pod).await?;
    }
    drop(templates);
    before.assert_nothing_added()
}

/// What a pod asks for it has, though the template is smaller.
#[tokio::test]
async fn template_grows_to_what_a_pod_asks_for() -> Result<()> {
    let (templates, mut cri, before) = ready().await?;
    let config = |name: &str| {
        let mut config = cri::pod_config(name);
        let resources = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 200_000,
            memory_limit_in_bytes: 300 << 20,
            ..Default::default()
        };
        config.linux.get_or_insert_default().resources = Some(resources);
        config
    };
    let booted = cri.run_pod(config("shim-booted"), "caisson").await?;
    templates.wait_for(1)?;
    let already = templates.origins();
    let cloned = cri.run_pod(config("shim-cloned"), "caisson").await?;
    ensure!(templates.origins() == (already.0 + 1, already.1), "{}", templates.node().containerd_log());
    let mut seen = Vec::new();
    for pod in [&booted, &cloned] {
        let main = cri::container_config("main", BUSYBOX_IMAGE, &["sleep", "1000"]);
        let container = cri.run_container(pod, main).await?;
        let said =
            cri.said(&container, "nproc; sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo").await?;
        let numbers = said.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        let [processors, kib] = numbers[..] else { anyhow::bail!("{said}") };
        ensure!(processors == 2, "{said}");
        seen.push(kib >> 10);
        cri.remove_pod(pod).await?;
    }
    let [booted, cloned] = seen[..] else { anyhow::bail!("{seen:?}") };
    // Page structures of plugged memory come out of what was there before.
    ensure!(cloned >= 300 && cloned.abs_diff(booted) < 24, "MiB booted and cloned: {seen:?}");
    drop(templates);
    before.assert_nothing_added()
}

#[tokio::test]
async fn template_that_is_damaged_is_replaced_and_the_pod_boots() -> Result<()> {
    let (templates, mut cri, before) = ready().await?;
    templates.prepare()?;
    let [template] = &templates.list()?[..] else { anyhow::bail!("{:?}", templates.list()?) };
    let state = template.join("state");
    let mut bytes = fs::read(&state)?;
    let middle = bytes.len() / 2;
    *bytes.get_mut(middle).context("an empty state file")? ^= 1;
    fs::write(&state, bytes)?;
    let already = templates.origins();
    let pod = cri.run_pod(cri::pod_config("shim-damaged"), "caisson").await?;
    ensure!(templates.origins() == (already.0, already.1 + 1), "{:?}", templates.origins());
    ensure!(templates.list()?.is_empty(), "it is still there");
    let words = identity(&mut cri, &pod).await?;
    ensure!(words.len() == 4, "{words:?}");
    cri.remove_pod(&pod).await?;
    drop(templates);
    before.assert_nothing_added()
}

/// A builder that is killed at any moment leaves nothing that the next one does not remove, and no template.
#[tokio::test]
async fn template_builders_may_be_killed() -> Result<()> {
    let (templates, mut cri, before) = ready().await?;
    for wait in [100, 1500, 4000] {
        let mut builder = templates.builder()?.spawn()?;
        std::thread::sleep(Duration::from_millis(wait));
        builder.kill()?;
        builder.wait()?;
        ensure!(templates.list()?.is_empty(), "a template of a builder that was killed after {wait} ms");
    }
    templates.prepare()?;
    let pod = cri.run_pod(cri::pod_config("shim-after-kills"), "caisson").await?;
    identity(&mut cri, &pod).await?;
    cri.remove_pod(&pod).await?;
    drop(templates);
    before.assert_nothing_added()
}
