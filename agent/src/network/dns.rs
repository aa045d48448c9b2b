//! resolv.conf(5).

use std::fs;
use std::io;
use std::path::Path;

use caisson_protocol::v1::Dns;

use super::{NetworkError, parse};

/// The file's text.
///
/// # Errors
/// When a name server is not an address, or a word would not be one word of one line.
pub fn resolv_conf(dns: &Dns) -> Result<String, NetworkError> {
    let mut text = String::new();
    for server in &dns.servers {
        // With a zone, as in fe80::1%eth0.
        let (address, zone) = server.split_once('%').unwrap_or((server, ""));
        parse::address("dns server", address)?;
        if !zone.is_empty() {
            word("dns server", zone)?;
        }
        text.push_str(&format!("nameserver {server}\n"));
    }
    for (keyword, field, words) in
        [("search", "dns search", &dns.searches), ("options", "dns option", &dns.options)]
    {
        if words.is_empty() {
            continue;
        }
        for each in words {
            word(field, each)?;
        }
        text.push_str(&format!("{keyword} {}\n", words.join(" ")));
    }
    Ok(text)
}

/// Replaces the text of `path` in place: containers have the file itself mounted.
///
/// # Errors
/// As [`resolv_conf`], or when the file can not be written.
pub fn write_resolv_conf(path: &Path, dns: &Dns) -> Result<(), NetworkError> {
    let text = resolv_conf(dns)?;
    let write = || -> io::Result<()> { fs::write(path, text) };
    write().map_err(|source| NetworkError::Io { action: "write resolv.conf", source })
}

fn word(field: &'static str, text: &str) -> Result<(), NetworkError> {
    let valid = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    if valid { Ok(()) } else { Err(NetworkError::invalid(field, text)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file() {
        let dns = Dns {
            servers: vec!["10.96.0.10".into(), "fe80::1%eth0".into()],
            searches: vec!["default.svc.cluster.local".into(), "svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        };
        let text = resolv_conf(&dns).unwrap();
        assert_eq!(
            text,
            "nameserver 10.96.0.10\nnameserver fe80::1%eth0\nsearch default.svc.cluster.local svc.cluster.local\n\
             options ndots:5\n"
        );
    }

    #[test]
    fn lines_can_not_be_smuggled_in() {
        for bad in ["a\nnameserver 1.2.3.4", "", "a b"] {
            assert!(resolv_conf(&Dns { searches: vec![bad.into()], ..Dns::default() }).is_err(), "{bad:?}");
        }
        assert!(resolv_conf(&Dns { servers: vec!["host".into()], ..Dns::default() }).is_err());
    }
}
