//! The size of a pod that is up, as its containers come, go and change.

use std::future::Future;

use super::error::PodError;
use crate::log::one_line;
use crate::machine::Machine;
use crate::sizing::{Demand, Policy, Shape, Size};

/// How large the pod's machine is, and why.
#[derive(Debug)]
pub struct PodSize {
    policy: Policy,
    demand: Demand,
    shape: Shape,
    size: Size,
    /// Whether the machine has reached `size`. After a change that failed it may be on its way to another.
    settled: bool,
}

impl PodSize {
    /// That of a pod whose machine is yet to be made.
    ///
    /// # Errors
    /// When the pod may not be that large.
    pub fn new(policy: Policy, demand: Demand) -> Result<PodSize, PodError> {
        let size = policy.size(&demand)?;
        Ok(PodSize { policy, demand, shape: policy.shape(size), size, settled: true })
    }

    /// What the machine is to be made with.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// What a template is made with that machines of this size start from, if there is to be one.
    pub fn template(&self) -> Option<Shape> {
        self.policy.template(self.size)
    }

    /// The machine was made with another shape, and becomes of its size now.
    ///
    /// # Errors
    /// When it does not.
    pub async fn start_from(&mut self, machine: &Machine, shape: Shape) -> Result<(), PodError> {
        self.shape = shape;
        self.settled = self.size == shape.boot;
        self.become_of(machine, self.size).await
    }

    /// Makes place for what comes on top. The machine becomes larger if it must, and never smaller.
    ///
    /// # Errors
    /// When the pod may not be, or can't be made, that large. Then nothing has changed.
    pub async fn grow(
        &mut self,
        machine: &Machine,
        change: impl FnOnce(&mut Demand),
    ) -> Result<(), PodError> {
        let mut demand = self.demand.clone();
        change(&mut demand);
        self.become_of(machine, self.size.or_larger(self.policy.size(&demand)?)).await?;
        self.demand = demand;
        Ok(())
    }

    /// Has the limits inside changed by `inside`, and the machine with them: it is as large as both need while that is
    /// under way.
    ///
    /// # Errors
    /// When the pod may not be, or can't be made, of that size, and those of `inside`. A machine that can't become
    /// smaller stays as it is.
    pub async fn change(
        &mut self,
        machine: &Machine,
        change: impl FnOnce(&mut Demand),
        inside: impl Future<Output = Result<(), PodError>>,
    ) -> Result<(), PodError> {
        let mut demand = self.demand.clone();
        change(&mut demand);
        let (before, after) = (self.size, self.policy.size(&demand)?);
        self.become_of(machine, before.or_larger(after)).await?;
        if let Err(error) = inside.await {
            if let Err(error) = self.become_of(machine, before).await {
                tracing::warn!(error = one_line(&error), "the machine stays larger than it has to be");
            }
            return Err(error);
        }
        // The limits inside hold by now, whether the machine follows or not.
        self.demand = demand;
        self.become_of(machine, after).await
    }

    /// A container is gone. The machine stays as it is: its place is kept for the next one.
    pub fn release(&mut self, container: &str) {
        self.demand.remove(container);
    }

    async fn become_of(&mut self, machine: &Machine, size: Size) -> Result<(), PodError> {
        if self.settled && size == self.size {
            return Ok(());
        }
        let target = self.shape.target(size)?;
        if target.vcpus < size.vcpus {
            tracing::warn!(wanted = size.vcpus, gets = target.vcpus, "the machine was made for fewer vCPUs");
        }
        self.settled = false;
        machine.resize(target).await?;
        self.settled = true;
        tracing::info!(vcpus = target.vcpus, memory_mib = size.memory_mib, "resized");
        self.size = size;
        Ok(())
    }
}
