//! Both transports against drivers good and bad, over the buses and configuration space.

use vmm_api::kvm::Doorbell;

use self::rig::{ACKNOWLEDGE_DRIVER, OWN, STATUS, memory, rig, rig_on};
use super::Transport;
use super::core::status::{DEVICE_NEEDS_RESET, DRIVER_OK, FEATURES_OK};
use crate::bus::IoSize;
use crate::testing::{Buffer, RawDescriptor};
use crate::virtio::feature;

mod garbage;
mod rig;
mod saved;

#[test]
fn identities_are_those_of_each_interface() {
    let ident = |transport| {
        let rig = rig(transport);
        let bars: Vec<u32> = (0..6)
            .map(|i| rig.config(0x10 + 4 * i, IoSize::Dword))
            .collect();
        let (id, subsystem) = (
            rig.config(0, IoSize::Dword),
            rig.config(0x2c, IoSize::Dword),
        );
        (id, rig.config(8, IoSize::Byte), subsystem, bars)
    };
    let (legacy, modern) = (0x2001, 0xc000_400c);
    let port = |at: u32| at | 1;
    assert_eq!(
        ident(Transport::Legacy),
        (
            0x1005_1af4,
            0,
            0x0004_1af4,
            vec![legacy, 0xc000_0000, 0, 0, 0, 0]
        )
    );
    let bars = vec![0, 0xc000_0000, port(0x2000), 0, modern, 0];
    assert_eq!(
        ident(Transport::Modern),
        (0x1044_1af4, 1, 0x0004_1af4, bars)
    );
    let bars = vec![legacy, 0xc000_0000, port(0x2020), 0, modern, 0];
    assert_eq!(
        ident(Transport::Transitional),
        (0x1005_1af4, 0, 0x0004_1af4, bars)
    );
    assert!(rig(Transport::Legacy).capabilities(9).is_empty());
    assert_eq!(rig(Transport::Modern).capabilities(9).len(), 6);
}

#[test]
fn a_legacy_driver_is_served_by_intx() {
    for transport in [Transport::Legacy, Transport::Transitional] {
        let rig = rig(transport);
        let offered = rig.input(0, IoSize::Dword);
        assert_eq!(
            offered, 0x3800_0020,
            "own, any layout, indirect, event index"
        );
        rig.output(4, IoSize::Dword, u32::MAX);
        assert_eq!(
            rig.input(4, IoSize::Dword),
            offered,
            "what is offered, no more"
        );
        rig.output(4, IoSize::Dword, 0x20);
        rig.output(18, IoSize::Byte, ACKNOWLEDGE_DRIVER.into());
        let mut driver = rig.legacy_queue(0, 16);
        assert_eq!(rig.echo.features(), None);
        rig.output(18, IoSize::Byte, (ACKNOWLEDGE_DRIVER | DRIVER_OK).into());
        assert_eq!(
            (rig.echo.features(), rig.echo.queues()),
            (Some(0x20), vec![0])
        );
        assert_eq!(rig.doorbells.bound()[0], Doorbell::Port(0x2010, 0));

        rig.exchange(&mut driver, || rig.output(16, IoSize::Word, 0));
        assert!(rig.intx.level());
        assert_eq!(rig.config(6, IoSize::Word) & 8, 8, "interrupt status");
        rig.set_config(4, IoSize::Word, 0x0407);
        assert!(!rig.intx.level(), "INTx disabled");
        rig.set_config(4, IoSize::Word, 0x0007);
        assert_eq!(rig.input(19, IoSize::Byte), 1);
        assert_eq!((rig.intx.level(), rig.input(19, IoSize::Byte)), (false, 0));

        let interrupts = rig
            .echo
            .running
            .lock()
            .unwrap()
            .as_ref()
            .unwrap()
            .interrupts
            .clone();
        interrupts.signal_config();
        assert!(rig.intx.level());
        rig.output(18, IoSize::Byte, 0);
        assert!(!rig.intx.level() && rig.echo.features().is_none());
        assert!(rig.doorbells.bound().is_empty());
        assert_eq!(rig.input(8, IoSize::Dword), 0);
    }
}

/// As FreeBSD's drivers did, which asked a disk for its name before they were ready.
#[test]
fn a_legacy_driver_may_kick_before_it_is_ready() {
    let rig = rig(Transport::Transitional);
    rig.output(18, IoSize::Byte, ACKNOWLEDGE_DRIVER.into());
    rig.output(16, IoSize::Word, 0);
    assert_eq!(rig.echo.features(), None, "no queue is set up");
    let mut driver = rig.legacy_queue(0, 16);
    rig.exchange(&mut driver, || rig.output(16, IoSize::Word, 0));
    // A queue that comes late is started, one that is given back is stopped.
    rig.legacy_queue(1, 8);
    assert_eq!(rig.echo.queues(), [0, 1]);
    rig.output(8, IoSize::Dword, 0);
    rig.output(18, IoSize::Byte, (ACKNOWLEDGE_DRIVER | DRIVER_OK).into());
    assert_eq!(rig.echo.queues(), [0]);
}

#[test]
fn legacy_registers_make_room_for_vectors() {
    let rig = rig(Transport::Legacy);
    *rig.echo.config.lock().unwrap() = *b"abcdefgh";
    assert_eq!(rig.input(20, IoSize::Dword), u32::from_le_bytes(*b"abcd"));
    assert_eq!(
        rig.input(26, IoSize::Dword),
        0xffff_6867,
        "floats behind its end"
    );
    rig.enable_msix();
    assert_eq!(rig.input(20, IoSize::Dword), 0xffff_ffff, "no vectors");
    assert_eq!(rig.input(24, IoSize::Dword), u32::from_le_bytes(*b"abcd"));
    rig.output(25, IoSize::Byte, b'x'.into());
    assert_eq!(&rig.echo.config.lock().unwrap()[..3], b"axc");
    let mut driver = rig.legacy_queue(0, 16);
    for (vector, taken) in [(3, 0xffff), (0xfffe, 0xffff), (2, 2)] {
        rig.output(22, IoSize::Word, vector);
        assert_eq!(rig.input(22, IoSize::Word), taken);
    }
    rig.exchange(&mut driver, || rig.output(16, IoSize::Word, 0));
    assert_eq!(rig.msi.sent(), [(0xfee0_0000, 2)]);
    assert!(!rig.intx.level());
    rig.output(14, IoSize::Word, 2);
    assert_eq!(
        (rig.input(12, IoSize::Word), rig.input(8, IoSize::Dword)),
        (0, 0)
    );
}

#[test]
fn modern_features_are_negotiated_or_refused() {
    let rig = rig(Transport::Modern);
    let offered = (0..2).fold(0, |offered, half| {
        rig.set(0, 4, half);
        offered | rig.get(4, 4) << (32 * half)
    });
    let reset = feature::RING_RESET;
    assert_eq!(offered, OWN | 3 << 28 | feature::VERSION_1 | reset);
    rig.set(0, 4, 2);
    assert_eq!(rig.get(4, 4), 0);
    assert!(!rig.modern_features(OWN), "without VERSION_1");
    assert!(
        !rig.modern_features(feature::VERSION_1 | 1 << 6),
        "not offered"
    );
    rig.set(STATUS, 1, (ACKNOWLEDGE_DRIVER | DRIVER_OK).into());
    assert_eq!(rig.echo.features(), None, "no FEATURES_OK");
    rig.set(STATUS, 1, 0);
    assert!(rig.modern_features(feature::VERSION_1 | OWN));
    rig.set(12, 4, 0);
    assert!(rig.get(12, 4) != 0, "settled");
    assert_eq!((rig.get(18, 2), rig.get(24, 2)), (2, 16));
    rig.set(22, 2, 2);
    assert_eq!((rig.get(24, 2), rig.get(28, 2)), (0, 0), "no such queue");
}

#[test]
fn a_modern_driver_is_served_by_msix() {
    let rig = rig(Transport::Transitional);
    rig.enable_msix();
    let mut driver = rig.modern_start();
    let features = feature::VERSION_1 | feature::RING_RESET | OWN;
    assert_eq!(rig.echo.features(), Some(features));
    rig.set(16, 2, 0);
    rig.set(26, 2, 1);
    let memory = rig.bar(4) + 0x3000;
    let bound = [Doorbell::Port(0x2020, 0), Doorbell::Memory(memory)];
    assert_eq!(rig.doorbells.bound()[..2], bound);
    // As if KVM had not taken it: by memory, then by port.
    rig.exchange(&mut driver, || rig.set(0x3000, 2, 0));
    rig.exchange(&mut driver, || {
        rig.buses.ports.write(0x2020, IoSize::Word, 0).unwrap()
    });
    assert_eq!(rig.msi.sent(), [(0xfee0_0000, 1); 2]);

    // The doorbells go where the BAR goes, and nowhere if it does not decode.
    rig.set_config(0x20, IoSize::Dword, 0xd000_0000);
    assert!(
        rig.doorbells
            .bound()
            .contains(&Doorbell::Memory(0xd000_3000))
    );
    rig.set_config(4, IoSize::Word, 1);
    assert!(
        !rig.doorbells
            .bound()
            .contains(&Doorbell::Memory(0xd000_3000))
    );
    assert!(rig.buses.mmio.read(0xd000_0000, &mut [0]).is_err());
    rig.set_config(4, IoSize::Word, 7);
    assert_eq!(
        rig.get(STATUS, 1) as u8,
        ACKNOWLEDGE_DRIVER | FEATURES_OK | DRIVER_OK
    );

    // What is enabled is settled.
    rig.set(24, 2, 2);
    assert_eq!((rig.get(24, 2), rig.get(28, 2)), (4, 1));
}

#[test]
fn either_driver_is_served_by_a_single_message() {
    let rig = rig_on(Transport::Transitional, memory(), false);
    assert!(rig.capabilities(0x11).is_empty(), "no MSI-X");
    assert_eq!(rig.config(0x14, IoSize::Dword), 0, "nor its BAR");
    rig.enable_msi(0x41);
    // The legacy registers have no vectors, and those of the modern ones take none.
    *rig.echo.config.lock().unwrap() = *b"abcdefgh";
    assert_eq!(rig.input(20, IoSize::Dword), u32::from_le_bytes(*b"abcd"));
    let mut driver = rig.legacy_queue(0, 16);
    rig.exchange(&mut driver, || rig.output(16, IoSize::Word, 0));
    assert_eq!(rig.msi.sent(), [(0xfee0_0000, 0x41)]);
    assert!(!rig.intx.level());
    assert_eq!(
        (rig.input(19, IoSize::Byte), rig.input(19, IoSize::Byte)),
        (1, 0)
    );
    rig.output(18, IoSize::Byte, 0);

    let mut driver = rig.modern_start();
    for register in [16, 26] {
        rig.set(register, 2, 0);
        assert_eq!(rig.get(register, 2), 0xffff);
    }
    rig.exchange(&mut driver, || rig.set(0x3000, 2, 0));
    assert_eq!(rig.msi.sent().len(), 2);
    assert_eq!(rig.get(0x1000, 1), 1);

    // Without it the pin says what nobody has read yet.
    rig.exchange(&mut driver, || rig.set(0x3000, 2, 0));
    assert_eq!((rig.msi.sent().len(), rig.intx.level()), (3, false));
    let at = rig.capabilities(0x05)[0];
    rig.set_config(at + 2, IoSize::Word, 0);
    rig.exchange(&mut driver, || rig.set(0x3000, 2, 0));
    assert_eq!((rig.msi.sent().len(), rig.intx.level()), (3, true));
    rig.enable_msi(0x42);
    assert!(!rig.intx.level(), "messages instead");
    rig.set_config(at + 2, IoSize::Word, 0);
    assert!(rig.intx.level());
    assert_eq!((rig.get(0x1000, 1), rig.intx.level()), (1, false));
}

#[test]
fn one_queue_is_reset_and_comes_back() {
    let rig = rig(Transport::Modern);
    let mut driver = rig.modern_start();
    rig.exchange(&mut driver, || rig.set(0x3000, 2, 0));
    rig.set(58, 2, 1);
    assert!(rig.echo.queues().is_empty());
    assert_eq!((rig.get(58, 2), rig.get(28, 2), rig.get(24, 2)), (0, 0, 16));
    let mut driver = rig.modern_queue(0, 8);
    assert_eq!(rig.echo.queues(), [0]);
    rig.exchange(&mut driver, || rig.set(0x3000, 2, 0));
}

#[test]
fn a_reset_forgets_requests() {
    let rig = rig(Transport::Modern);
    let mut driver = rig.modern_start();
    driver.send(&[Buffer::Writable(8)]);
    rig.set(0x3000, 2, 0);
    rig.set(STATUS, 1, 0);
    assert_eq!(rig.get(STATUS, 1), 0);
    rig.echo.serve(0);
    assert_eq!(driver.used(), None);
    let mut driver = rig.modern_start();
    rig.echo.serve(0);
    assert_eq!(driver.used(), None);
    rig.exchange(&mut driver, || rig.set(0x3000, 2, 0));
}

#[test]
fn nonsense_asks_for_a_reset() {
    let rig = rig(Transport::Modern);
    let mut driver = rig.modern_start();
    let raw = RawDescriptor {
        address: 0,
        len: 16,
        flags: 1,
        next: 0,
    };
    driver.set_descriptor(0, raw);
    driver.make_available(0);
    rig.set(0x3000, 2, 0);
    rig.echo.serve(0);
    assert!(rig.get(STATUS, 1) as u8 & DEVICE_NEEDS_RESET != 0);
    assert_eq!(rig.get(0x1000, 1), 2, "a configuration interrupt");
    rig.set(STATUS, 1, 0);
    let mut driver = rig.modern_start();
    rig.exchange(&mut driver, || rig.set(0x3000, 2, 0));

    // A queue outside of RAM.
    rig.set(STATUS, 1, 0);
    assert!(rig.modern_features(feature::VERSION_1));
    rig.set(32, 8, 1 << 40);
    rig.set(28, 2, 1);
    rig.set(
        STATUS,
        1,
        (ACKNOWLEDGE_DRIVER | FEATURES_OK | DRIVER_OK).into(),
    );
    assert!(rig.get(STATUS, 1) as u8 & DEVICE_NEEDS_RESET != 0);
    assert_eq!(rig.echo.features(), None);
}

#[test]
fn bars_are_reached_through_configuration_space() {
    let rig = rig(Transport::Modern);
    let at = *rig.capabilities(9).last().unwrap();
    assert_eq!(rig.config(at + 3, IoSize::Byte), 5);
    let window = |bar: u32, offset: u32, len: u32| {
        rig.set_config(at + 4, IoSize::Byte, bar);
        rig.set_config(at + 8, IoSize::Dword, offset);
        rig.set_config(at + 12, IoSize::Dword, len);
    };
    window(4, 18, 2);
    assert_eq!(rig.config(at + 16, IoSize::Word), 2, "number of queues");
    window(4, 22, 2);
    rig.set_config(at + 16, IoSize::Word, 1);
    assert_eq!(rig.get(24, 2), 8, "queue 1 is selected");
    for (bar, offset, len) in [
        (4, 0x3fff, 2),
        (4, 0, 3),
        (1, 0, 4),
        (4, u32::MAX, 4),
        (0, 0, 1),
    ] {
        window(bar, offset, len);
        rig.set_config(at + 16, IoSize::Dword, 7);
        assert_eq!(
            rig.config(at + 16, IoSize::Dword),
            7,
            "nothing but a register"
        );
    }
}
