//! Requests on the control socket, and the machines that they describe.
#![no_main]

use caisson_vmm::machine_file;
use caisson_vmm_api::control::protocol::{Command, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    let Ok(request) = serde_json::from_slice::<Request>(message) else { return };
    if let Command::Create(config) = &request.command
        && machine_file::check(config).is_ok()
    {
        machine_file::command_line(config).expect("a command line");
    }
    // What was understood is said again in the same words.
    let again = serde_json::to_vec(&request).expect("JSON");
    assert_eq!(serde_json::from_slice::<Request>(&again).expect("our own words"), request);
});
