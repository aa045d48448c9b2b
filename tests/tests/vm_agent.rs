//! The agent as PID 1 of a guest in our own VMM: containers, devices, restores, the end.

use anyhow::{Context, Result, ensure};
use caisson_e2e::{containers, pod_vm::PodVm};
use caisson_protocol::v1;

#[tokio::test]
async fn the_agent_is_pid_1_and_ends_the_machine_in_order() -> Result<()> {
    let mut vm = PodVm::boot("").await?;
    let details = vm.client.agent().guest_details(v1::GuestDetailsRequest {}).await?.into_inner();
    println!("{details:?}");
    let health = vm.client.agent().health(v1::HealthRequest {}).await?.into_inner();
    ensure!(health.faults.is_empty(), "{health:?}");
    vm.client.sandbox().shutdown(v1::ShutdownRequest::default()).await?;
    let status = vm.vmm.wait()?;
    ensure!(status.success(), "the VMM ended with {status}; {}", vm.vmm.tail());
    Ok(())
}

#[tokio::test]
async fn busybox_runs_in_a_machine() -> Result<()> {
    let mut vm = PodVm::boot("memory.hotplug_mib = 0\n").await?;
    let pod = vm.pod().await?;
    containers::output_and_exit_code_arrive(&pod).await.context("output")?;
    containers::a_terminal_has_a_size_and_both_directions(&pod).await.context("terminal")?;
    containers::execs_and_signals_reach_a_running_container(&pod).await.context("exec")?;
    containers::too_much_memory_is_reported(&pod).await.context("memory")?;
    containers::a_hundred_megabytes_go_through_a_container_intact(&pod).await.context("100 MB")?;
    Ok(())
}
