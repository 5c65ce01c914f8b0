//! What the tables say, read back by [`reader`](super::reader).

use std::collections::BTreeMap;

use proptest::prelude::*;
use uuid::Uuid;
use vmm_api::memory::{HIGHMEM_BASE, LOWMEM_LIMIT, MemoryLayout};

use super::reader::{Bios, aml_names, resources};
use super::*;

fn spec() -> FirmwareSpec {
    FirmwareSpec {
        era: Era::Today,
        name: "guest0".parse().unwrap(),
        uuid: None,
        topology: "2".parse().unwrap(),
        processor: ProcessorId {
            signature: 0x00a2_0f12,
            features: 0x178b_fbff,
        },
        memory: MemoryLayout {
            lowmem: 256 << 20,
            highmem: 0,
        },
        mptable: true,
        acpi: true,
        smbios: true,
        com: vec![ComPort::Com1],
        roots: vec![root(0, 0x2000..0x1_0000, 0xc000_0000..IOAPIC_BASE)],
        intx: Vec::new(),
        ecam: None,
    }
}

fn root(bus: u8, ports: Range<u32>, memory: Range<u32>) -> PciRoot {
    PciRoot { bus, ports, memory }
}

fn names(spec: &FirmwareSpec) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    aml_names(Bios::of(spec).aml(), "", &mut found);
    found
}

#[test]
fn the_seeds_mp_table_says_what_the_seed_saw() {
    let (id, entries) = Bios::of(&FirmwareSpec {
        era: Era::Y2012,
        ..spec()
    })
    .mp_entries();
    assert_eq!(id, "NETAPP  vFiler      ");
    let cpus: Vec<_> = entries[&0]
        .iter()
        .map(|cpu| (cpu[1], cpu[2], cpu[3]))
        .collect();
    assert_eq!(cpus, [(0, 0x10, 3), (1, 0x10, 1)]);
    assert_eq!(
        entries[&0][1][4..12],
        [0xa5, 6, 0, 0, 0xff, 0xfb, 0xeb, 0xbf]
    );
    let buses: Vec<_> = entries[&1].iter().map(|bus| (bus[1], &bus[2..])).collect();
    assert_eq!(buses, [(0, &b"ISA   "[..]), (1, &b"PCI   "[..])]);
    assert_eq!(
        entries.keys().collect::<Vec<_>>(),
        [&0, &1],
        "no I/O APIC, no interrupts"
    );
}

#[test]
fn todays_mp_table_describes_kvms_interrupt_wiring() {
    let intx = vec![IntxRoute {
        bus: 0,
        slot: 3,
        pin: 1,
        gsi: 19,
    }];
    let (id, entries) = Bios::of(&FirmwareSpec { intx, ..spec() }).mp_entries();
    assert_eq!(id, "RHYVE   Hypervisor  ");
    assert_eq!(entries[&2], [[2, 0, 0x11, 1, 0, 0, 0xc0, 0xfe]]);
    let wired = |flags: u16, bus, irq, pin| {
        let [low, high] = flags.to_le_bytes();
        vec![3, 0, low, high, bus, irq, 0, pin]
    };
    let interrupts = &entries[&3];
    assert_eq!(interrupts.len(), 16);
    for irq in [1, 3, 4, 8, 15] {
        assert!(interrupts.contains(&wired(0, 1, irq, irq)), "IRQ {irq}");
    }
    assert!(interrupts.contains(&wired(0, 1, 0, 2)), "the timer");
    assert!(interrupts.contains(&wired(15, 1, 9, 9)), "the SCI");
    assert!(interrupts.contains(&wired(0, 0, 3 << 2, 19)), "slot 3 INTA");
    assert_eq!(
        entries[&4],
        [[4, 3, 0, 0, 1, 0, 0xff, 0], [4, 1, 0, 0, 1, 0, 0xff, 1]]
    );
}

#[test]
fn the_madt_agrees_with_the_mp_table() {
    let madt = Bios::of(&spec()).madt();
    let wanted: [(u8, &[u8]); 6] = [
        (0, &[0, 0, 1, 0, 0, 0]),
        (0, &[1, 1, 1, 0, 0, 0]),
        (1, &[0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]),
        (2, &[0, 0, 2, 0, 0, 0, 0, 0]),
        (2, &[0, 9, 9, 0, 0, 0, 15, 0]),
        (4, &[0xff, 0, 0, 1]),
    ];
    assert_eq!(madt, wanted.map(|(kind, bytes)| (kind, bytes.to_vec())));
}

#[test]
fn processors_from_255_on_are_x2apics() {
    let topology = "300,cores=300".parse().unwrap();
    let madt = Bios::of(&FirmwareSpec {
        topology,
        mptable: false,
        ..spec()
    })
    .madt();
    let of = |kind| {
        madt.iter()
            .filter(|(k, _)| *k == kind)
            .map(|(_, b)| b)
            .collect::<Vec<_>>()
    };
    assert_eq!((of(0).len(), of(9).len(), of(10).len()), (255, 45, 1));
    assert_eq!(
        of(9)[44][..],
        [0, 0, 0x2b, 1, 0, 0, 1, 0, 0, 0, 0x2b, 1, 0, 0]
    );
}

#[test]
fn the_fadt_has_the_fixed_hardware_and_no_more() {
    let bios = Bios::of(&spec());
    let fadt = bios.acpi()["FACP"];
    let byte = |at| bios.bytes(fadt + at, 1)[0];
    assert_eq!((bios.u16(fadt + 46), bios.u32(fadt + 48)), (9, 0xb2));
    assert_eq!((byte(52), byte(53)), (0xa0, 0xa1));
    assert_eq!((bios.u32(fadt + 56), byte(88)), (0x400, 4));
    assert_eq!((bios.u32(fadt + 64), byte(89)), (0x404, 2));
    assert_eq!((bios.u32(fadt + 76), byte(91)), (0x408, 4));
    assert_eq!(
        (bios.u32(fadt + 80), bios.u32(fadt + 84)),
        (0, 0),
        "no GPEs"
    );
    assert_eq!(byte(108), 0x32);
    assert_eq!(
        bios.u16(fadt + 109),
        0b101,
        "ISA devices, no 8042, no VGA, but a clock"
    );
    assert_eq!(bios.u32(fadt + 112), 0x1565);
    assert_eq!(
        bios.bytes(fadt + 116, 13),
        [1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 6]
    );
    assert_eq!(
        bios.bytes(fadt + 148, 12),
        [1, 32, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(
        bios.bytes(fadt + 172, 12),
        [1, 16, 0, 2, 4, 4, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(
        bios.bytes(fadt + 208, 12),
        [1, 32, 0, 3, 8, 4, 0, 0, 0, 0, 0, 0]
    );
}

#[test]
fn the_dsdt_has_what_the_guest_cannot_find_by_itself() {
    let names = names(&spec());
    assert_eq!(
        names.keys().collect::<Vec<_>>(),
        [
            "_S5_",
            "_SB_.COM1._CRS",
            "_SB_.COM1._HID",
            "_SB_.COM1._UID",
            "_SB_.PC00._BBN",
            "_SB_.PC00._CRS",
            "_SB_.PC00._HID",
            "_SB_.PC00._UID",
            "_SB_.RTC_._CRS",
            "_SB_.RTC_._HID",
        ]
    );
    assert_eq!(names["_S5_"], [0x12, 8, 4, 0x0a, 5, 0x0a, 5, 0, 0]);
    assert_eq!(
        names["_SB_.COM1._HID"],
        [0x0c, 0x41, 0xd0, 0x05, 0x01],
        "PNP0501"
    );
    let com = resources(&names["_SB_.COM1._CRS"]);
    assert_eq!(com[0], (8, vec![1, 0xf8, 3, 0xf8, 3, 1, 8]));
    assert_eq!(com[1], (0x89, vec![0b0011, 1, 4, 0, 0, 0]));
    let root = resources(&names["_SB_.PC00._CRS"]);
    let tags: Vec<_> = root.iter().map(|(tag, bytes)| (*tag, bytes[0])).collect();
    assert_eq!(tags, [(0x88, 2), (8, 1), (0x88, 1), (0x88, 1), (0x87, 0)]);
    let window: Vec<_> = root[4].1[7..15].to_vec();
    assert_eq!(window, [0, 0, 0, 0xc0, 0xff, 0xff, 0xbf, 0xfe]);
}

#[test]
fn every_com_port_is_described_with_its_interrupt() {
    let names = names(&FirmwareSpec {
        com: ComPort::ALL.to_vec(),
        ..spec()
    });
    for (port, base, irq) in [(1, 0x3f8, 4), (2, 0x2f8, 3), (3, 0x3e8, 4), (4, 0x2e8, 3u8)] {
        let crs = resources(&names[&format!("_SB_.COM{port}._CRS")]);
        let [low, high] = u16::to_le_bytes(base);
        assert_eq!(crs[0].1, [1, low, high, low, high, 1, 8]);
        assert_eq!((crs[1].1[0], crs[1].1[2]), (0b1011, irq));
    }
}

#[test]
fn pci_interrupts_and_ecam_are_described() {
    let intx = vec![IntxRoute {
        bus: 0,
        slot: 31,
        pin: 4,
        gsi: 16,
    }];
    let ecam = Some(Ecam {
        base: 0xe000_0000,
        last_bus: 255,
    });
    let spec = FirmwareSpec {
        roots: vec![root(0, 0x2000..0x1_0000, 0xc000_0000..0xe000_0000)],
        intx,
        ecam,
        ..spec()
    };
    let names = names(&spec);
    let prt = [
        0x12, 15, 1, 0x12, 12, 4, 0x0c, 0xff, 0xff, 31, 0, 0x0a, 3, 0, 0x0a, 16,
    ];
    assert_eq!(names["_SB_.PC00._PRT"], prt);
    assert_eq!(
        names["_SB_.PC00._HID"],
        [0x0c, 0x41, 0xd0, 0x0a, 0x08],
        "PNP0A08"
    );
    let root = resources(&names["_SB_.PC00._CRS"]);
    assert_eq!(
        root[4].1[11..15],
        [0xff, 0xff, 0xff, 0xdf],
        "the window ends below ECAM"
    );
    let board = resources(&names["_SB_.MBRD._CRS"]);
    assert_eq!(board, [(0x86, vec![1, 0, 0, 0, 0xe0, 0, 0, 0, 0x10])]);
    let bios = Bios::of(&spec);
    let mcfg = bios.acpi()["MCFG"];
    assert_eq!(bios.u64(mcfg + 44), 0xe000_0000);
    assert_eq!(bios.bytes(mcfg + 52, 4), [0, 0, 0, 255]);
}

#[test]
fn each_bus_is_a_root_of_its_own() {
    let route = |bus, gsi| IntxRoute {
        bus,
        slot: 2,
        pin: 1,
        gsi,
    };
    let spec = FirmwareSpec {
        roots: vec![
            root(0, 0x2000..0x9000, 0xc000_0000..0xd000_0000),
            root(1, 0x9000..0x1_0000, 0xd000_0000..0xe000_0000),
        ],
        intx: vec![route(0, 18), route(1, 19)],
        ..spec()
    };
    let names = names(&spec);
    for (bus, gsi, ports, memory) in [
        (0u8, 18, [0x0d00u16, 0x8fff], [0xc000_0000u32, 0xcfff_ffff]),
        (1, 19, [0x9000, 0xffff], [0xd000_0000, 0xdfff_ffff]),
    ] {
        let of = |name: &str| &names[&format!("_SB_.PC{bus:02X}.{name}")];
        let integer = |bus| if bus == 0 { vec![0] } else { vec![1] };
        assert_eq!((of("_UID"), of("_BBN")), (&integer(bus), &integer(bus)));
        assert_eq!(of("_PRT")[6..], [0x0c, 0xff, 0xff, 2, 0, 0, 0, 0x0a, gsi]);
        let all = resources(of("_CRS"));
        let words = |bytes: &[u8]| {
            let words = bytes.chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
            words.collect::<Vec<_>>()
        };
        // Granularity, minimum, maximum.
        assert_eq!(words(&all[0].1[3..9]), [0, bus.into(), bus.into()]);
        assert_eq!(all.iter().any(|(tag, _)| *tag == 8), bus == 0, "0xcf8");
        assert_eq!(words(&all[all.len() - 2].1[5..9]), ports);
        let window = &all[all.len() - 1].1[7..15];
        assert_eq!(*window, *memory.map(u32::to_le_bytes).concat());
    }

    let (_, entries) = Bios::of(&spec).mp_entries();
    let buses: Vec<_> = entries[&1].iter().map(|bus| (bus[1], &bus[2..5])).collect();
    assert_eq!(buses, [(0, &b"PCI"[..]), (1, b"PCI"), (2, b"ISA")]);
    let (pci, isa): (Vec<_>, Vec<_>) = entries[&3].iter().partition(|entry| entry[4] != 2);
    assert!(
        pci.iter()
            .map(|entry| (entry[4], entry[5], entry[7]))
            .eq([(0, 8, 18), (1, 8, 19)])
    );
    assert_eq!(isa.len(), 15);

    let roots = |buses: std::ops::RangeInclusive<u8>| {
        buses.map(|bus| root(bus, 0..0, 0..0)).collect::<Vec<_>>()
    };
    let build = |era, roots| {
        build(&FirmwareSpec {
            era,
            roots,
            ..spec.clone()
        })
    };
    assert!(build(Era::Today, roots(0..=254)).is_ok());
    for (era, buses) in [(Era::Today, 0..=255), (Era::Y2012, 255..=255)] {
        let roots = roots(buses);
        let refused = Err(FirmwareError::TooManyBuses(roots.len()));
        assert_eq!(build(era, roots), refused);
    }
}

#[test]
fn the_smbios_uuid_is_the_given_one_or_the_names() {
    let uuid = Uuid::parse_str("00112233-4455-6677-8899-aabbccddeeff").unwrap();
    let of = |spec: &FirmwareSpec| Bios::of(spec).smbios()[&1][0].0[8..24].to_vec();
    let given = of(&FirmwareSpec {
        uuid: Some(uuid),
        ..spec()
    });
    assert_eq!(given[..8], [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66]);
    assert_eq!(given[8..], uuid.as_bytes()[8..]);
    let made = Uuid::from_slice_le(&of(&spec())).unwrap();
    assert_eq!(
        (made, made.get_version_num()),
        (default_uuid(&spec().name), 5)
    );
    assert_ne!(made, default_uuid(&"guest1".parse().unwrap()));
}

#[test]
fn smbios_counts_sockets_cores_and_memory() {
    let topology = "cpus=12,sockets=2,cores=3,threads=2".parse().unwrap();
    let memory = MemoryLayout {
        lowmem: 3 << 30,
        highmem: 2 << 30,
    };
    let table = Bios::of(&FirmwareSpec {
        topology,
        memory,
        ..spec()
    })
    .smbios();
    let sockets: Vec<_> = table[&4].iter().map(|(bytes, _)| &bytes[35..38]).collect();
    assert_eq!(sockets, [[3, 3, 6]; 2]);
    assert_eq!(table[&4][0].0[8..12], 0x00a2_0f12u32.to_le_bytes());
    assert_eq!(table[&17][0].0[12..14], 5120u16.to_le_bytes());
    let ranges: Vec<_> = table[&19].iter().map(|(bytes, _)| &bytes[4..12]).collect();
    assert_eq!(
        ranges,
        [
            [0, 0, 0, 0, 0xff, 0xff, 0x2f, 0],
            [0, 0, 0x40, 0, 0xff, 0xff, 0x5f, 0]
        ]
    );
    for (bytes, strings) in table.values().flatten() {
        assert_eq!(usize::from(bytes[1]), bytes.len());
        assert!(
            strings
                .iter()
                .all(|text| !text.is_empty() && text.len() < 65)
        );
    }
}

#[test]
fn nothing_is_made_that_was_not_asked_for() {
    let none = FirmwareSpec {
        mptable: false,
        acpi: false,
        smbios: false,
        ..spec()
    };
    assert_eq!(build(&none), Ok(vec![]));
    let memory = MemoryLayout {
        lowmem: 4096,
        highmem: 0,
    };
    assert_eq!(
        build(&FirmwareSpec {
            memory,
            ..none.clone()
        }),
        Ok(vec![])
    );
    let bios = Bios::of(&FirmwareSpec {
        mptable: true,
        ..none
    });
    assert_eq!(bios.scan(Bios::BASE, b"RSD PTR "), None);
    assert_eq!(bios.scan(Bios::BASE, b"_SM_"), None);
}

#[test]
fn what_cannot_be_described_is_refused() {
    let topology = "256".parse().unwrap();
    let err = build(&FirmwareSpec { topology, ..spec() }).unwrap_err();
    let text = "an MP table has 8-bit APIC ids, too few for 256 CPUs: leave it out with -Y";
    assert_eq!(
        (err.to_string().as_str(), err),
        (text, FirmwareError::TooManyCpus(256))
    );

    let memory = MemoryLayout {
        lowmem: 0xff000,
        highmem: 1 << 30,
    };
    let err = build(&FirmwareSpec { memory, ..spec() });
    assert_eq!(err, Err(FirmwareError::Memory(0xff000)));

    let topology = "sockets=2000".parse().unwrap();
    let err = build(&FirmwareSpec {
        topology,
        mptable: false,
        ..spec()
    });
    assert!(matches!(
        err,
        Err(FirmwareError::TooLarge {
            table: "SMBIOS table",
            ..
        })
    ));
    let topology = "cores=4000".parse().unwrap();
    let err = build(&FirmwareSpec {
        topology,
        mptable: false,
        ..spec()
    });
    assert!(matches!(
        err,
        Err(FirmwareError::TooLarge {
            table: "ACPI tables",
            ..
        })
    ));

    for (slot, pin, gsi) in [
        (32, 1, 16),
        (1, 0, 16),
        (1, 5, 16),
        (1, 1, 24),
        (1, 1, 0),
        (1, 1, 2),
    ] {
        let bus = 0;
        let route = IntxRoute {
            bus,
            slot,
            pin,
            gsi,
        };
        let err = build(&FirmwareSpec {
            intx: vec![route],
            ..spec()
        });
        assert_eq!(err, Err(FirmwareError::Intx(route)));
    }
    for (base, last_bus) in [(0xb000_0000, 0), (0xe000_1000, 0), (0xf000_0000, 255)] {
        let ecam = Some(Ecam { base, last_bus });
        let err = build(&FirmwareSpec { ecam, ..spec() });
        assert!(matches!(err, Err(FirmwareError::Ecam { .. })), "{base:#x}");
    }
}

/// An integer of AML (ACPI 6.5, 20.2.3).
fn integer(aml: &mut &[u8]) -> u32 {
    let prefix = aml.split_off_first().unwrap();
    let bytes = match prefix {
        0 | 1 => return (*prefix).into(),
        0x0a => 1,
        0x0b => 2,
        0x0c => 4,
        other => panic!("{other:#x} is no integer"),
    };
    let bytes = aml.split_off(..bytes).unwrap();
    bytes
        .iter()
        .rev()
        .fold(0, |all, byte| all << 8 | u32::from(*byte))
}

/// Enters a package; its number of elements (20.2.4, 20.2.5.4).
fn package(aml: &mut &[u8]) -> u8 {
    let [0x12, lead] = *aml.split_off(..2).unwrap() else {
        panic!("no package");
    };
    aml.split_off(..usize::from(lead >> 6)).unwrap();
    *aml.split_off_first().unwrap()
}

/// What a _PRT says: slot, pin (0 is INTA) and where it goes.
fn routes(mut aml: &[u8]) -> Vec<(u8, u8, u8)> {
    if aml.is_empty() {
        return Vec::new();
    }
    let count = package(&mut aml);
    let route = |_| {
        assert_eq!(package(&mut aml), 4);
        let [address, pin, source, gsi] = std::array::from_fn(|_| integer(&mut aml));
        assert_eq!((address & 0xffff, source), (0xffff, 0));
        ((address >> 16) as u8, pin as u8, gsi as u8)
    };
    let mut routes: Vec<_> = (0..count).map(route).collect();
    assert!(aml.is_empty());
    routes.sort_unstable();
    routes
}

fn any_spec() -> impl Strategy<Value = FirmwareSpec> {
    let era = prop_oneof![Just(Era::Y2012), Just(Era::Y2014), Just(Era::Today)];
    let memory = (0x100..=LOWMEM_LIMIT >> 12, 0..=(1u64 << 46) >> 12);
    let com = proptest::sample::subsequence(ComPort::ALL.to_vec(), 0..=4);
    let routes = proptest::collection::btree_map((0u8..2, 0u8..32, 1u8..=4), 3u8..24, 0..=128);
    let ecam = proptest::option::of((0u32..512, any::<u8>()));
    (
        era,
        1u16..=255,
        memory,
        com,
        routes,
        ecam,
        any::<Option<u128>>(),
    )
        .prop_map(
            |(era, cpus, (low, high), com, routes, ecam, uuid)| FirmwareSpec {
                era,
                uuid: uuid.map(Uuid::from_u128),
                topology: CpuTopology {
                    cpus,
                    sockets: cpus,
                    cores: 1,
                    threads: 1,
                },
                memory: MemoryLayout {
                    lowmem: low << 12,
                    highmem: high << 12,
                },
                com,
                intx: routes
                    .into_iter()
                    .map(|((bus, slot, pin), gsi)| IntxRoute {
                        bus,
                        slot,
                        pin,
                        gsi,
                    })
                    .collect(),
                roots: (0..2).map(|bus| root(bus, 0..0, 0..0)).collect(),
                ecam: ecam.map(|(mib, last_bus)| Ecam {
                    base: 0xc000_0000 + (mib << 20),
                    last_bus,
                }),
                ..spec()
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_machine_can_be_read_back(spec in any_spec()) {
        let bios = Bios::of(&spec);
        let cpus = usize::from(spec.topology.cpus);

        let (_, entries) = bios.mp_entries();
        prop_assert_eq!(entries[&0].len(), cpus);
        let interrupts = entries.get(&3).map_or(0, Vec::len);
        let wanted = if spec.era == Era::Y2012 { 0 } else { 15 + spec.intx.len() };
        prop_assert_eq!(interrupts, wanted);

        let processors = bios.madt().iter().filter(|(kind, _)| *kind == 0).count();
        prop_assert_eq!(processors, cpus);

        let mut names = BTreeMap::new();
        aml_names(bios.aml(), "", &mut names);
        if spec.era != Era::Y2012 {
            // Both tables lead a pin to the same input.
            let mut listed: Vec<_> = entries[&3].iter().filter(|entry| entry[4] < 2).collect();
            listed.sort();
            let listed = listed.iter().map(|e| (e[4], e[5] >> 2, e[5] & 3, e[7]));
            let routed = (0..2).flat_map(|bus| {
                let table = names.get(&format!("_SB_.PC{bus:02X}._PRT"));
                routes(table.map_or(&[][..], Vec::as_slice))
                    .into_iter()
                    .map(move |(slot, pin, gsi)| (bus, slot, pin, gsi))
            });
            prop_assert!(listed.eq(routed));
        }
        let coms = names.keys().filter(|name| name.starts_with("_SB_.COM")).count();
        prop_assert_eq!(coms, spec.com.len() * 3);
        for (_, buffer) in names.iter().filter(|(name, _)| name.ends_with("_CRS")) {
            resources(buffer);
        }

        let table = bios.smbios();
        prop_assert_eq!(table[&4].len(), cpus);
        let end = |bytes: &[u8]| match bytes[4..8] {
            [0xff, 0xff, 0xff, 0xff] => u64::from_le_bytes(bytes[23..31].try_into().unwrap()) + 1,
            _ => u64::from(u32::from_le_bytes(bytes[8..12].try_into().unwrap())) * 1024 + 1024,
        };
        let last = end(&table[&19][table[&19].len() - 1].0);
        let wanted = match spec.memory.highmem {
            0 => spec.memory.lowmem,
            highmem => HIGHMEM_BASE + highmem,
        };
        prop_assert_eq!(last, wanted);
    }
}
