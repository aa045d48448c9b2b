/// How a device tells its driver that something happened.
///
/// The transport implements it over an irqfd and its interrupt status register; tests implement it as a
/// counter. Devices call it only after the state that the driver will read is in guest memory.
pub trait Interrupt: Send + Sync {
    /// Used buffers were added to the queue with this index.
    fn signal_queue(&self, index: usize);

    /// The device's configuration space changed. The transport also steps the configuration generation.
    fn signal_config(&self);
}
