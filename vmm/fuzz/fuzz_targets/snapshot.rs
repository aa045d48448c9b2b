//! The state file: its frame, its content, and devices that go on from whatever it says.
#![no_main]

use caisson_virtio::{Persist, VirtioDevice, devices::{rng::{HostEntropy, Rng}, vsock::{HostEnd, Vsock, VsockResources}}};
use caisson_vmm::{machine::{DeviceState, SlotState}, snapshot::format::{VERSION, decode}};
use caisson_vmm_api::devices::VsockConfig;
use caisson_virtio_fuzz::{Session, memory, play_restored};
use libfuzzer_sys::{
    arbitrary::{Arbitrary, Unstructured},
    fuzz_target,
};

/// The frame's magic and version are the first bytes of any state file; length and checksum follow from the rest.
fn framed(body: &[u8]) -> Vec<u8> {
    let mut file = b"CAISSON\0".to_vec();
    file.extend(VERSION.to_le_bytes());
    file.extend(u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
    file.extend(crc32fast::hash(body).to_le_bytes());
    file.extend(body);
    file
}

fn device(state: &DeviceState) -> Option<Box<dyn VirtioDevice>> {
    Some(match state {
        DeviceState::Rng(state) => Box::new(Rng::restore(state, HostEntropy).ok()?),
        DeviceState::Vsock(state) => {
            let config = VsockConfig { guest_cid: 3 };
            Box::new(Vsock::restore(state, VsockResources { config, host: HostEnd::default() }).ok()?)
        }
        _ => return None,
    })
}

fuzz_target!(|data: &[u8]| {
    let _ = decode(data);
    let _ = decode(&framed(data));
    let Ok((state, rest)) = postcard::take_from_bytes::<SlotState>(data) else { return };
    let Some(device) = device(&state.device) else { return };
    let session = Session::arbitrary(&mut Unstructured::new(rest)).ok();
    play_restored(&state.transport, &memory(), device, session.as_ref());
});
