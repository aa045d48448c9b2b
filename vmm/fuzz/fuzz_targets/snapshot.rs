//! The state file: its frame, its content, and devices that go on from whatever it says.
#![no_main]

use caisson_virtio::{devices::{DeviceState, rng::{HostEntropy, Rng}, vsock::{HostEnd, Vsock}}, VirtioDevice, mmio::TransportState};
use caisson_vmm::snapshot::format::decode;
use caisson_vmm_api::devices::VsockConfig;
use caisson_virtio_fuzz::{Session, memory, play_restored};
use libfuzzer_sys::{
    arbitrary::{Arbitrary, Unstructured},
    fuzz_target,
};

/// The frame's magic and version are the first bytes of any state file; length and checksum follow from the rest.
fn framed(body: &[u8]) -> Vec<u8> {
    let mut file = b"CAISSON\0".to_vec();
    file.extend(1u32.to_le_bytes());
    file.extend(u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
    file.extend(crc32fast::hash(body).to_le_bytes());
    file.extend(body);
    file
}

fn device(state: &DeviceState) -> Option<Box<dyn VirtioDevice>> {
    Some(match state {
        DeviceState::Rng(state) => Box::new(Rng::from_state(state, HostEntropy).ok()?),
        DeviceState::Vsock(state) => {
            Box::new(Vsock::from_state(state, VsockConfig { guest_cid: 3 }, HostEnd::default()).ok()?)
        }
        _ => return None,
    })
}

fuzz_target!(|data: &[u8]| {
    let _ = decode(data);
    let _ = decode(&framed(data));
    let Ok((state, rest)) = postcard::take_from_bytes::<TransportState>(data) else { return };
    let Some(device) = device(&state.device) else { return };
    let session = Session::arbitrary(&mut Unstructured::new(rest)).ok();
    play_restored(&state, &memory(), device, session.as_ref());
});
