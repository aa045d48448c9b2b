//! A mock driver and real unix sockets, with the device between them.

mod driver;
mod endings;
mod filtered;
mod hostile;
mod streams;
