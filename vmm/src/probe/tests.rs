use super::*;

fn host(vendor: Option<Vendor>) -> HostFacts {
    HostFacts {
        vendor,
        kernel_lists_it: true,
        under_hypervisor: false,
        module_present: true,
        nested_guests: false,
    }
}

fn node(group: &str, mode: u32) -> DeviceNode {
    DeviceNode { owner: "root".into(), group: group.into(), mode, user: "jo".into() }
}

#[test]
fn a_missing_device_names_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kvm");
    let verdict = probe_at(&path, Duration::from_secs(1));
    assert!(matches!(&verdict, Verdict::Missing { device, .. } if *device == path), "{verdict:?}");
    assert!(!verdict.is_usable());
}

#[test]
fn each_reason_for_a_missing_device_has_its_own_remedy() {
    let cases = [
        (HostFacts { vendor: None, under_hypervisor: true, ..host(None) }, "nested virtualization"),
        (host(None), "BIOS"),
        (HostFacts { kernel_lists_it: false, ..host(Some(Vendor::Svm)) }, "locked by the firmware"),
        (HostFacts { module_present: false, ..host(Some(Vendor::Vmx)) }, "modprobe kvm_intel"),
        (HostFacts { module_present: false, ..host(Some(Vendor::Svm)) }, "modprobe kvm_amd"),
        (host(Some(Vendor::Svm)), "--device /dev/kvm"),
    ];
    for (facts, remedy) in cases {
        let text = Verdict::Missing { device: "/dev/kvm".into(), host: facts }.to_string();
        assert!(text.contains(remedy), "{text}");
    }
}

#[test]
fn permission_denied_names_the_group_only_when_it_helps() {
    let text = |node| Verdict::PermissionDenied { device: "/dev/kvm".into(), node }.to_string();
    assert!(text(Some(node("kvm", 0o660))).contains("usermod -aG kvm jo"));
    assert!(text(Some(node("root", 0o600))).contains("setfacl -m u:jo:rw"));
    // Being in the group would not help: it may not write.
    assert!(text(Some(node("kvm", 0o640))).contains("setfacl"));
    assert!(text(None).contains("root"));
}

#[test]
fn another_device_is_not_mistaken_for_kvm() {
    let verdict = probe_at(Path::new("/dev/null"), Duration::from_secs(1));
    assert!(matches!(verdict, Verdict::WrongApi { version: -1, .. }), "{verdict:?}");
}

#[test]
fn a_directory_cannot_be_opened() {
    let verdict = probe_at(Path::new("/"), Duration::from_secs(1));
    assert!(matches!(verdict, Verdict::Unopenable { .. }), "{verdict:?}");
}

#[test]
fn without_the_flag_no_run_of_guests_makes_it_hardware() {
    assert_eq!(judge(&host(None), Ok(())), Verdict::Paravirtual { failed: None });
    let failed = (GuestTest::Int3, GuestFailure::Hung);
    assert_eq!(judge(&host(None), Err(failed.clone())), Verdict::Paravirtual { failed: Some(failed) });
}

#[test]
fn nested_virtualization_for_guests_is_warned_of() {
    let facts = HostFacts { nested_guests: true, ..host(Some(Vendor::Svm)) };
    let said = judge(&facts, Ok(())).to_string();
    assert!(said.contains("Warning") && said.contains("options kvm_amd nested=0"), "{said}");
}

#[test]
fn with_the_flag_the_guests_decide() {
    let facts = host(Some(Vendor::Vmx));
    let works = judge(&facts, Ok(()));
    assert_eq!(works, Verdict::Hardware { vendor: Vendor::Vmx, nested: false, nested_guests: false });
    assert_eq!(works.to_string(), "KVM works (Intel VT-x).");
    assert!(matches!(
        judge(&facts, Err((GuestTest::Xrstor, GuestFailure::Exit("Shutdown".into())))),
        Verdict::Broken { test: GuestTest::Xrstor, .. }
    ));
    assert_eq!(judge(&facts, Err((GuestTest::RealMode, GuestFailure::Busy))), Verdict::Busy);
}

#[test]
fn a_guest_that_never_reports_is_given_up_on() {
    let (_report, reports) = mpsc::channel();
    let start = Instant::now();
    let outcome = collect(&reports, Duration::from_millis(20));
    assert_eq!(outcome, Err((GuestTest::RealMode, GuestFailure::Hung)));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn cpuinfo_flags_are_whole_words() {
    let cpuinfo = "processor\t: 0\nflags\t\t: fpu svm_lock avic\nvmx flags\t: svm\n";
    assert!(host::lists_flag(cpuinfo, "avic"));
    assert!(!host::lists_flag(cpuinfo, "svm"));
    assert!(!host::lists_flag("", "svm"));
}

/// Whatever this machine is, the probe ends, and what it says agrees with the CPU.
#[test]
fn this_machine_gets_a_verdict_in_time() {
    let start = Instant::now();
    let verdict = probe(Duration::from_secs(10));
    assert!(start.elapsed() < Duration::from_secs(20));
    if HostFacts::read().vendor.is_none() {
        assert!(!verdict.is_usable(), "{verdict}");
    }
}

/// With no time at all the guests are interrupted wherever they are, and their thread comes back.
#[test]
fn no_time_at_all_is_a_hang_and_not_a_wait() {
    let Ok(kvm) = open(Path::new("/dev/kvm")) else { return };
    let start = Instant::now();
    assert_eq!(run_guests(kvm, Duration::ZERO), Err((GuestTest::RealMode, GuestFailure::Hung)));
    assert!(start.elapsed() < GRACE + Duration::from_secs(2));
}
