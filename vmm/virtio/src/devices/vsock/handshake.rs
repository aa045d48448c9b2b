//! The line by which a host's client says which port of the guest it wants: `CONNECT <port>\n`.

/// The longest line, with its newline.
pub(super) const MAX_LINE: usize = 32;

/// What the bytes read so far are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A whole line of `len` bytes that asks for `port`.
    Connect { port: u32, len: usize },
    /// The beginning of one.
    Partial,
    /// Something else.
    Bad,
}

/// Reads the line at the beginning of `bytes`, which may hold what follows it, too.
pub(super) fn parse(bytes: &[u8]) -> Line {
    let line = bytes.get(..MAX_LINE).unwrap_or(bytes);
    let Some(end) = line.iter().position(|byte| *byte == b'\n') else {
        return if line.len() == MAX_LINE { Line::Bad } else { Line::Partial };
    };
    let port = line
        .get(..end)
        .and_then(|line| line.strip_prefix(b"CONNECT "))
        .filter(|digits| digits.iter().all(u8::is_ascii_digit))
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| digits.parse().ok());
    match port {
        Some(port) => Line::Connect { port, len: end + 1 },
        None => Line::Bad,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn whole_lines_and_nothing_else() {
        assert_eq!(parse(b"CONNECT 1024\nrest"), Line::Connect { port: 1024, len: 13 });
        assert_eq!(parse(b"CONNECT 4294967295\n"), Line::Connect { port: u32::MAX, len: 19 });
        for partial in [&b""[..], b"CONN", b"CONNECT 10"] {
            assert_eq!(parse(partial), Line::Partial);
        }
        for bad in ["CONNECT \n", "CONNECT +1\n", "CONNECT 4294967296\n", "connect 1\n", "CONNECT 1 \n", "\n"]
        {
            assert_eq!(parse(bad.as_bytes()), Line::Bad, "{bad:?}");
        }
        assert_eq!(parse(&[b'1'; MAX_LINE]), Line::Bad);
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes: Vec<u8>) {
            if let Line::Connect { len, .. } = parse(&bytes) {
                prop_assert_eq!(bytes[len - 1], b'\n');
            }
        }
    }
}
