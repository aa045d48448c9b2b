//! The machine file, as TOML and as JSON.
#![no_main]

use caisson_vmm::config::MachineConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let parsed = [toml::from_str(text).ok(), serde_json::from_str(text).ok()];
    for config in parsed.into_iter().flatten() {
        let config: MachineConfig = config;
        // What passes the check must not fail where it is used.
        if config.validate().is_ok() {
            config.command_line().expect("a command line");
            let _ = config.shape();
        }
    }
});
