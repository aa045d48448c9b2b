use std::error::Error;

use crate::VirtioDevice;

/// A device that can be put into a snapshot, and made again from it.
///
/// A snapshot holds a device in two parts. Its transport saves the registers and the queues, which the device hands
/// over when it comes to rest ([`VirtioDevice::quiesce`]); the device adds what is its own, as [`Persist::State`].
/// A restored device is made by [`restore`](Persist::restore) and, where its driver had been using it, activated by
/// its transport with the saved queues ([`Activation::restored`](crate::Activation::restored)).
pub trait Persist: VirtioDevice + Sized {
    /// What of the device goes into a snapshot, save for its queues: plain data, in the structure that the snapshot's
    /// version stands for.
    type State;
    /// What the device is restored on: its configuration as it is now, and what it needs from the host, open.
    type Resources;
    /// Why the device could not be made.
    type Error: Error;

    /// The state of a device that has come to rest.
    fn state(&self) -> Self::State;

    /// Checks that the guest finds the device as it was: what its driver has read of it may not change.
    ///
    /// # Errors
    /// [`StateMismatch`] with the option that has changed.
    fn check(state: &Self::State, resources: &Self::Resources) -> Result<(), StateMismatch>;

    /// Makes the device from its state, without the check. The state comes from a file: no value in it is believed.
    ///
    /// # Errors
    /// When the state is impossible, or the host refuses; see the device's error.
    fn from_state(state: &Self::State, resources: Self::Resources) -> Result<Self, Self::Error>;

    /// Makes the device from its state, if it is still as the guest knows it.
    ///
    /// # Errors
    /// [`RestoreError::Mismatch`] from [`check`](Self::check), [`RestoreError::Device`] from
    /// [`from_state`](Self::from_state).
    fn restore(state: &Self::State, resources: Self::Resources) -> Result<Self, RestoreError<Self::Error>> {
        Self::check(state, &resources)?;
        Self::from_state(state, resources).map_err(RestoreError::Device)
    }
}

/// An option that the guest has seen is not what it was when the machine was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not what it was when the machine was saved")]
pub struct StateMismatch(pub &'static str);

impl StateMismatch {
    /// Compares an option with its saved value.
    ///
    /// # Errors
    /// [`StateMismatch`] when they differ.
    ///
    /// ```
    /// use caisson_virtio::StateMismatch;
    ///
    /// StateMismatch::check("net.mtu", 1500, 1500)?;
    /// assert_eq!(StateMismatch::check("net.mtu", 1500, 9000), Err(StateMismatch("net.mtu")));
    /// # Ok::<(), StateMismatch>(())
    /// ```
    pub fn check<T: PartialEq>(option: &'static str, saved: T, now: T) -> Result<(), Self> {
        if saved == now { Ok(()) } else { Err(Self(option)) }
    }
}

/// Why a device could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError<E: Error> {
    /// It is not as the guest knows it.
    #[error(transparent)]
    Mismatch(#[from] StateMismatch),
    /// It could not be made.
    #[error(transparent)]
    Device(E),
}
