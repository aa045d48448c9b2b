//! The serial console: a 16550A at the first PC port, writing to a rate-limited sink.

mod sink;

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use caisson_virtio::mmio::IrqLine;
pub use sink::{ConsoleMetrics, ConsoleSink};
use vm_superio::{Serial, SerialState, Trigger, serial::SerialEvents};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// First port of the device.
pub const SERIAL_PORT: u16 = 0x3f8;
/// How many ports it has.
pub const SERIAL_PORTS: u16 = 8;
/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;

/// The device's interrupt line.
pub struct SerialIrq(pub Arc<dyn IrqLine>);

impl Trigger for SerialIrq {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.pulse();
        Ok(())
    }
}

/// Offset of the interrupt enable register, and its bit for received data.
const INTERRUPT_ENABLE: u8 = 1;
const RECEIVED_DATA: u8 = 1;

/// Tells who feeds the console that the guest takes more; nothing, until somebody wants to know.
#[derive(Default)]
struct Room(OnceLock<EventFd>);

impl Room {
    fn signal(&self) {
        if let Some(event) = self.0.get() {
            // It fails only when it has been signalled 2^64 times already.
            let _ = event.write(1);
        }
    }
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.signal();
    }
}

type Uart = Serial<SerialIrq, Arc<Room>, ConsoleSink>;

/// The console, shared by all processors and the thread that feeds its input.
pub struct Console {
    uart: Mutex<Uart>,
    room: Arc<Room>,
}

impl Console {
    /// A console as after power-on.
    #[must_use]
    pub fn new(irq: Arc<dyn IrqLine>, sink: ConsoleSink) -> Self {
        let room = Arc::default();
        Self { uart: Mutex::new(Serial::with_events(SerialIrq(irq), Arc::clone(&room), sink)), room }
    }

    /// A console that goes on from a saved state.
    ///
    /// # Errors
    /// [`std::io::ErrorKind::InvalidData`] when the state is impossible.
    pub fn from_state(
        state: &SavedSerial,
        irq: Arc<dyn IrqLine>,
        sink: ConsoleSink,
    ) -> std::io::Result<Self> {
        let room: Arc<Room> = Arc::default();
        let state = SerialState::from(state.clone());
        let uart = Serial::from_state(&state, SerialIrq(irq), room.clone(), sink)
            .map_err(|_| std::io::ErrorKind::InvalidData)?;
        Ok(Self { uart: Mutex::new(uart), room })
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one of the device's ports is `port`.
    #[must_use]
    pub fn has(port: u16) -> bool {
        (SERIAL_PORT..SERIAL_PORT + SERIAL_PORTS).contains(&port)
    }

    /// A read of one of its ports.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(port.wrapping_sub(SERIAL_PORT))) {
            *byte = self.lock().read(offset);
        }
    }

    /// A write to one of its ports. Several bytes are a string instruction's, all for the same port.
    pub fn write(&self, port: u16, data: &[u8]) {
        let Ok(offset) = u8::try_from(port.wrapping_sub(SERIAL_PORT)) else { return };
        let mut uart = self.lock();
        for byte in data {
            // The sink never fails; what it cannot take it drops and counts.
            let _ = uart.write(offset, *byte);
        }
        if offset == INTERRUPT_ENABLE {
            self.room.signal();
        }
    }

    /// A descriptor that becomes readable when the guest may take more input.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn watch_room(&self) -> io::Result<RawFd> {
        if let Some(event) = self.room.0.get() {
            return Ok(event.as_raw_fd());
        }
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(self.room.0.get_or_init(|| event).as_raw_fd())
    }

    /// Takes the event of [`watch_room`](Self::watch_room).
    pub fn take_room(&self) {
        if let Some(event) = self.room.0.get() {
            // Empty when nothing has happened since.
            let _ = event.read();
        }
    }

    /// Types `input` on the console; returns how many bytes its buffer took. A guest whose driver does not
    /// listen takes none: it would throw them away when it sets up the port.
    pub fn input(&self, input: &[u8]) -> usize {
        let mut uart = self.lock();
        if uart.state().interrupt_enable & RECEIVED_DATA == 0 {
            return 0;
        }
        let room = uart.fifo_capacity().min(input.len());
        input.get(..room).and_then(|input| uart.enqueue_raw_bytes(input).ok()).unwrap_or(0)
    }

    /// The device's state.
    #[must_use]
    pub fn save(&self) -> SavedSerial {
        self.lock().state().into()
    }

    /// Its counters.
    #[must_use]
    pub fn metrics(&self) -> Arc<ConsoleMetrics> {
        self.lock().writer().metrics()
    }
}

/// The registers and the input that the guest has not read yet.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs, reason = "the registers' own names")]
pub struct SavedSerial {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub in_buffer: Vec<u8>,
}

impl From<SerialState> for SavedSerial {
    fn from(state: SerialState) -> Self {
        Self {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }
}

impl From<SavedSerial> for SerialState {
    fn from(saved: SavedSerial) -> Self {
        Self {
            baud_divisor_low: saved.baud_divisor_low,
            baud_divisor_high: saved.baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.in_buffer,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Edges(AtomicUsize);

    impl IrqLine for Edges {
        fn pulse(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_the_guest_writes_comes_out() {
        let mut file = tempfile::tempfile().unwrap();
        let console = Console::new(
            Arc::new(Edges::default()),
            ConsoleSink::new(Some(file.try_clone().unwrap()), 1 << 20),
        );
        console.write(SERIAL_PORT, b"hello\n");
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello\n");
    }

    #[test]
    fn input_reaches_the_guest_with_an_interrupt_and_survives_a_snapshot() {
        let edges = Arc::new(Edges::default());
        let console = Console::new(edges.clone(), ConsoleSink::new(None, 0));
        console.write(SERIAL_PORT + 1, &[1]);
        assert_eq!(console.input(b"hi"), 2);
        assert!(edges.0.load(Ordering::Relaxed) > 0);
        let restored = Console::from_state(&console.save(), edges, ConsoleSink::new(None, 0)).unwrap();
        let mut byte = [0];
        restored.read(SERIAL_PORT, &mut byte);
        assert_eq!(&byte, b"h");
    }

    #[test]
    fn more_input_than_fits_is_left_to_the_sender() {
        let console = Console::new(Arc::new(Edges::default()), ConsoleSink::new(None, 0));
        assert_eq!(console.input(b"x"), 0, "nobody listens");
        console.write(SERIAL_PORT + 1, &[1]);
        let taken = console.input(&[b'x'; 1000]);
        assert!(taken < 1000);
        assert_eq!(console.input(b"y"), 0);
    }
}
