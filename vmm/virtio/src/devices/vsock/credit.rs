//! Flow control (VIRTIO 1.3, section 5.10.6.3): who may still send how much.
//!
//! Counters run modulo 2^32. What the guest claims is believed only where it is possible; what it may send is
//! what it was promised, and one byte more ends the connection.

/// What one connection may send to the guest.
#[derive(Clone, Debug, Default)]
pub(super) struct SendCredit {
    /// The size of the guest's receive buffer, by its own account.
    buf_alloc: u32,
    /// Bytes that the guest has taken out of it.
    forwarded: u32,
    /// Bytes sent to it.
    sent: u32,
}

impl SendCredit {
    /// Believes the guest's account of its buffer, unless it names bytes that are not on their way.
    ///
    /// Linux stamps packets before it orders them, so an older account may follow a newer one. It reads as a
    /// claim to have taken nearly 2^32 bytes, the same as a lie does, and both are left alone.
    pub(super) fn update(&mut self, buf_alloc: u32, forwarded: u32) {
        if forwarded.wrapping_sub(self.forwarded) <= self.in_flight() {
            self.buf_alloc = buf_alloc;
            self.forwarded = forwarded;
        }
    }

    /// How many bytes may be sent now.
    pub(super) fn available(&self) -> u32 {
        self.buf_alloc.saturating_sub(self.in_flight())
    }

    /// Counts bytes as sent.
    pub(super) fn spend(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.forwarded)
    }
}

/// The guest sent more than it was allowed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more data than there was credit for")]
pub(super) struct Overrun;

/// What the guest may send on one connection.
#[derive(Clone, Debug)]
pub(super) struct ReceiveCredit {
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    /// What of `forwarded` the guest was told.
    told: u32,
}

impl ReceiveCredit {
    /// For a buffer of `buf_alloc` bytes.
    pub(super) fn new(buf_alloc: u32) -> Self {
        Self { buf_alloc, received: 0, forwarded: 0, told: 0 }
    }

    /// Takes in bytes from the guest.
    pub(super) fn receive(&mut self, bytes: u32) -> Result<(), Overrun> {
        if bytes > self.buf_alloc.saturating_sub(self.held()) {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(bytes);
        Ok(())
    }

    /// Bytes have gone on to the host's socket, or were thrown away as it is closed.
    pub(super) fn forward(&mut self, bytes: u32) {
        // Never past what came in: the count is our own, but an overrun here would be credit from nothing.
        self.forwarded = self.forwarded.wrapping_add(bytes.min(self.held()));
    }

    /// Bytes that came in and have not gone on.
    pub(super) fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Whether the guest must be told of its new credit, as it may be waiting for it.
    ///
    /// It is told at half the buffer: early enough not to run dry, and seldom enough not to cost a packet per
    /// packet. A guest that has run out of credit is always told, since all of it comes back in the end.
    pub(super) fn is_news(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= (self.buf_alloc / 2).max(1)
    }

    /// `(buf_alloc, fwd_cnt)` for a header on its way to the guest.
    pub(super) fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.buf_alloc, self.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn stale_and_false_accounts_are_ignored() {
        let mut credit = SendCredit::default();
        credit.update(100, 0);
        credit.spend(100);
        assert_eq!(credit.available(), 0);
        credit.update(100, 60);
        assert_eq!(credit.available(), 60);
        credit.update(100, 40);
        credit.update(u32::MAX, 101);
        assert_eq!(credit.available(), 60);
        credit.update(10, 60);
        assert_eq!(credit.available(), 0, "a buffer that shrank below what is under way");
    }

    #[test]
    fn a_guest_out_of_credit_hears_of_more() {
        let mut credit = ReceiveCredit::new(1);
        credit.receive(1).unwrap();
        assert!(!credit.is_news());
        assert_eq!(credit.receive(1), Err(Overrun));
        credit.forward(1);
        assert!(credit.is_news());
        assert_eq!(credit.tell(), (1, 1));
        assert!(!credit.is_news());
        credit.receive(1).unwrap();
    }

    proptest! {
        /// Whatever the guest claims, no more is under way than one of its claims allowed.
        #[test]
        fn never_sends_past_the_largest_buffer(claims: Vec<(u32, u32, u32)>, start: u32) {
            let mut credit = SendCredit { buf_alloc: 0, forwarded: start, sent: start };
            let mut largest = 0;
            for (buf_alloc, forwarded, want) in claims {
                credit.update(buf_alloc, start.wrapping_add(forwarded));
                largest = largest.max(buf_alloc);
                credit.spend(want.min(credit.available()));
                prop_assert!(credit.in_flight() <= largest);
            }
        }

        /// Held bytes never pass the buffer, and once all is forwarded a guest that was stuck is told.
        #[test]
        fn never_holds_more_than_the_buffer(size in 1u32..10_000, steps: Vec<(u16, u16)>) {
            let mut credit = ReceiveCredit::new(size);
            let mut promised = size;
            for (receive, forward) in steps {
                let receive = u32::from(receive).min(promised);
                prop_assert!(credit.receive(receive).is_ok());
                promised -= receive;
                prop_assert!(credit.held() <= size);
                credit.forward(u32::from(forward));
                if credit.is_news() {
                    let (buf_alloc, _) = credit.tell();
                    promised = buf_alloc - credit.held();
                }
            }
            credit.forward(u32::MAX);
            prop_assert!(promised > 0 || credit.is_news());
        }
    }
}
