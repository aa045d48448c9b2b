//! Attributes of rtnetlink(7) messages (`struct rtattr`), as bytes.
//!
//! `netlink-packet-route`'s own know every kind of link and route there is, and would be an eighth of the agent.

use netlink_packet_core::{DecodeError, Emitable, Nla, NlasIterator};

/// The attributes of a message, or those that are nested in one of them.
#[derive(Default)]
pub(super) struct Attributes(Vec<Attribute>);

struct Attribute {
    kind: u16,
    value: Vec<u8>,
}

impl Nla for Attribute {
    fn value_len(&self) -> usize {
        self.value.len()
    }

    fn kind(&self) -> u16 {
        self.kind
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.value);
    }
}

impl Attributes {
    /// Reads all of `bytes`.
    ///
    /// # Errors
    /// When an attribute's length leads out of them.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, DecodeError> {
        let read = |attribute: Result<netlink_packet_core::NlaBuffer<&[u8]>, DecodeError>| {
            attribute.map(|it| Attribute { kind: it.kind(), value: it.value().to_vec() })
        };
        NlasIterator::new(bytes).map(read).collect::<Result<_, _>>().map(Self)
    }

    /// Adds one.
    pub(super) fn push(&mut self, kind: u16, value: impl Into<Vec<u8>>) {
        self.0.push(Attribute { kind, value: value.into() });
    }

    /// Adds others, nested in one.
    pub(super) fn nest(&mut self, kind: u16, inner: &Attributes) {
        let mut value = vec![0; inner.buffer_len()];
        inner.emit(&mut value);
        self.push(kind, value);
    }

    /// The value of the first of this kind.
    pub(super) fn value(&self, kind: u16) -> Option<&[u8]> {
        self.0.iter().find(|attribute| attribute.kind == kind).map(|found| found.value.as_slice())
    }

    /// The same, if it is a number.
    pub(super) fn number(&self, kind: u16) -> Option<u32> {
        self.value(kind)?.try_into().ok().map(u32::from_ne_bytes)
    }
}

impl Emitable for Attributes {
    fn buffer_len(&self) -> usize {
        self.0.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.0.as_slice().emit(buffer);
    }
}
