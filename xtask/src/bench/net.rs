//! Networks side by side, in the nested lane: the same kernel and root, one vCPU, KVM for both, and a
//! tap interface for each guest. QEMU has one guest whose frames it moves itself, as rhyve does, and
//! one with vhost, whose frames the lane's kernel moves.
//!
//! iperf3 and the asker of the request-response row run in the lane, their servers in the guests. All
//! guests stay up and are measured by turns, while the others stand still.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::io::{MEMORY_MIB, Parts, Stage, qemu_mib, rhyve_mib};
use super::process::{Monitor, time};
use super::sample::Sample;

/// What is measured, with a name for the table.
const JOBS: [(&str, Job); 6] = [
    ("iperf3 to the guest, 1 stream", Job::Stream(&[])),
    (
        "iperf3 to the guest, 4 streams",
        Job::Stream(&["--parallel", "4"]),
    ),
    (
        "iperf3 from the guest, 1 stream",
        Job::Stream(&["--reverse"]),
    ),
    (
        "iperf3 from the guest, 4 streams",
        Job::Stream(&["--reverse", "--parallel", "4"]),
    ),
    ("a byte there and back", Job::Answers(1)),
    ("the same, eight at once", Job::Answers(ECHOES)),
];

/// How a row is measured.
#[derive(Clone, Copy)]
enum Job {
    /// By iperf3, with these options.
    Stream(&'static [&'static str]),
    /// With as many connections, each of which sends a byte and waits for it to come back.
    Answers(u16),
}

/// Turns of a round of a stream, which takes its time to come to its speed: no more of them, and no less than
/// a second each.
const TURNS_OF_STREAMS: u32 = 5;
/// How long a turn of questions and answers is: whatever else the machine does for a while meets all guests
/// alike if turns are short.
const TURN: Duration = Duration::from_millis(200);
/// How many such turns there are for each second of a round: twice its time, as it is the row of the smallest
/// difference.
const TURNS_OF_ANSWERS: u32 = 10;
/// The first port of a guest's echoes; each serves one connection at a time.
const ECHO: u16 = 7;
/// How many there are.
const ECHOES: u16 = 8;
/// How long a server may take until it listens.
const PATIENCE: Duration = Duration::from_secs(20);
/// What of each stream is not counted: TCP finds its speed in it.
const OMITTED: Duration = Duration::from_secs(1);
/// What of each turn of answers is not counted: a card's threads find their ways in it.
const OMITTED_OF_TURN: Duration = Duration::from_millis(50);
/// What rhyve may take besides RAM, with one disk and one card.
const MOST_MIB: f64 = 6.0;
/// How often a measurement is tried before it counts as failed.
const TRIES: u32 = 3;

/// What was measured. One sample a job, in the order of the table: MiB a second, or answers a second.
#[derive(Debug, Serialize, Deserialize)]
pub struct Networks {
    rhyve: Vec<Sample>,
    qemu: Vec<Sample>,
    vhost: Vec<Sample>,
    /// Exits of the vCPU to user space for a thousand buffers of the card's queues, while a stream
    /// goes to the guest, and while it comes from there.
    exits_per_thousand: [f64; 2],
    /// With one disk and one card.
    rhyve_mib: f64,
    qemu_mib: f64,
}

/// A guest at a tap interface of its own.
struct Guest {
    monitor: Monitor,
    address: String,
    samples: Vec<Vec<f64>>,
}

/// Boots all and measures.
pub fn measure(parts: &Parts) -> Result<Networks, Box<dyn Error>> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let stage = Stage {
        parts,
        dir: dir.path(),
    };
    let mut guests = Vec::new();
    for (number, vhost) in [(0, None), (1, Some("off")), (2, Some("on"))] {
        let tap = format!("bench{number}");
        let address = format!("10.9.{number}.2");
        ip(&["tuntap", "add", &tap, "mode", "tap", "vnet_hdr"])?;
        ip(&["addr", "add", &format!("10.9.{number}.1/24"), "dev", &tap])?;
        ip(&["link", "set", &tap, "up"])?;
        let cmdline = format!("ip={address}/24");
        let mut monitor = match vhost {
            None => stage.rhyve(&cmdline, &format!("1,virtio-net,tap:{tap},virtio=modern"))?,
            Some(vhost) => stage.qemu(&cmdline, &tap, &card(&tap, vhost))?,
        };
        let last = ECHO + ECHOES - 1;
        let echo = format!(
            "for port in $(seq {ECHO} {last}); do \
             {{ while :; do nc -l -p $port -e cat; done & }} 2>/dev/null; done"
        );
        monitor.ask(&format!("{echo}; echo ser''ves"), "serves\r\n")?;
        monitor.stand_still(true)?;
        guests.push(Guest {
            monitor,
            address,
            samples: vec![Vec::new(); JOBS.len()],
        });
    }
    for round in 1..=parts.runs {
        for (row, (name, job)) in JOBS.iter().enumerate() {
            let values = match *job {
                Job::Stream(options) => streams(&mut guests, name, options, parts)?,
                Job::Answers(connections) => answers(&mut guests, connections, parts.seconds)?,
            };
            for (guest, value) in guests.iter_mut().zip(values) {
                if let Some(samples) = guest.samples.get_mut(row) {
                    samples.push(value);
                }
            }
        }
        eprintln!("round {round} of {} is done", parts.runs);
    }
    let [mut rhyve, qemu, vhost]: [Guest; 3] = guests.try_into().map_err(|_| "three guests")?;
    rhyve.monitor.stand_still(false)?;
    let exits_per_thousand = [
        rhyve.exits(&stage, &[])?,
        rhyve.exits(&stage, &["--reverse"])?,
    ];
    let (rhyve_mib, qemu_mib) = (rhyve_mib(&rhyve.monitor)?, qemu_mib(&qemu.monitor)?);
    if rhyve_mib > MOST_MIB {
        let mappings = rhyve.monitor.resident_mappings()?;
        eprintln!("more is resident than {MOST_MIB} MiB and RAM:\n{mappings}");
    }
    let [rhyve, qemu, vhost] =
        [rhyve, qemu, vhost].map(|guest| guest.samples.into_iter().map(Sample::from).collect());
    Ok(Networks {
        rhyve,
        qemu,
        vhost,
        exits_per_thousand,
        rhyve_mib,
        qemu_mib,
    })
}

/// QEMU's card at its best: kicks by an access to a port, which KVM need not decode, no legacy registers, no
/// option ROM, a receive queue as long as rhyve's.
fn card(tap: &str, vhost: &str) -> [String; 4] {
    [
        "-netdev".to_owned(),
        format!("tap,id=n0,ifname={tap},script=no,downscript=no,vhost={vhost}"),
        "-device".to_owned(),
        "virtio-net-pci,netdev=n0,disable-legacy=on,modern-pio-notify=on,romfile=,rx_queue_size=1024"
            .to_owned(),
    ]
}

fn ip(arguments: &[&str]) -> Result<(), Box<dyn Error>> {
    time(Command::new("/usr/sbin/ip").args(arguments))?;
    Ok(())
}

/// A round of a stream with all guests; MiB a second, of each.
fn streams(
    guests: &mut [Guest],
    name: &str,
    options: &[&str],
    parts: &Parts,
) -> Result<Vec<f64>, Box<dyn Error>> {
    let mut sums = vec![0.0; guests.len()];
    for _ in 0..TURNS_OF_STREAMS {
        for (guest, sum) in guests.iter_mut().zip(&mut sums) {
            guest.monitor.stand_still(false)?;
            *sum += tried(name, || guest.stream(options, parts))?;
            guest.monitor.stand_still(true)?;
        }
    }
    Ok(sums
        .into_iter()
        .map(|sum| sum / f64::from(TURNS_OF_STREAMS))
        .collect())
}

/// A round of questions, on so many connections to each guest; answers a second, of each.
fn answers(
    guests: &mut [Guest],
    connections: u16,
    seconds: u32,
) -> Result<Vec<f64>, Box<dyn Error>> {
    let mut asked = Vec::new();
    for guest in &mut *guests {
        guest.monitor.stand_still(false)?;
        asked.push((guest.connect(connections)?, 0));
        guest.monitor.stand_still(true)?;
    }
    let turns = seconds * TURNS_OF_ANSWERS;
    for _ in 0..turns {
        for (guest, (streams, count)) in guests.iter_mut().zip(&mut asked) {
            guest.monitor.stand_still(false)?;
            *count += ask_all(streams, TURN)?;
            guest.monitor.stand_still(true)?;
        }
    }
    let rate = |(_, count)| f64::from(count) / (TURN * turns).as_secs_f64();
    Ok(asked.into_iter().map(rate).collect())
}

/// Tries again what fails, and says so.
fn tried(
    name: &str,
    mut what: impl FnMut() -> Result<f64, Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    let mut tries = 1;
    loop {
        match what() {
            Err(error) if tries < TRIES => eprintln!("{name}, once more: {error}"),
            result => return result,
        }
        tries += 1;
    }
}

impl Guest {
    fn stream(&mut self, options: &[&str], parts: &Parts) -> Result<f64, Box<dyn Error>> {
        let seconds = parts.seconds.div_ceil(TURNS_OF_STREAMS);
        let output = self.iperf3(&parts.iperf3, seconds, options)?.output()?;
        rate(&output.stdout)
    }

    /// So many connections, each to an echo of its own.
    fn connect(&self, connections: u16) -> Result<Vec<TcpStream>, Box<dyn Error>> {
        let address = self.address.parse()?;
        let ports = ECHO..ECHO + connections;
        ports
            .map(|port| connect(SocketAddr::new(address, port)))
            .collect()
    }

    /// Starts a server for one client; the client.
    fn iperf3(
        &mut self,
        program: &Path,
        seconds: u32,
        options: &[&str],
    ) -> Result<Command, Box<dyn Error>> {
        // One that a client has not come to would be in the way.
        let serve = "killall iperf3 2>/dev/null; iperf3 --server --one-off --daemon; \
                     until netstat -ltn | grep -q ':5201 '; do :; done; echo list''ens";
        self.monitor.ask(serve, "listens\r\n")?;
        let mut client = Command::new("timeout");
        client.arg((seconds + 30).to_string()).arg(program);
        client.args(["--client", &self.address, "--json"]);
        client.args(["--omit", &OMITTED.as_secs().to_string()]);
        client.args(["--time", &seconds.to_string()]).args(options);
        Ok(client)
    }

    /// Exits to user space for a thousand buffers while nothing but a stream is at work.
    fn exits(&mut self, stage: &Stage<'_>, options: &[&str]) -> Result<f64, Box<dyn Error>> {
        let mut client = self.iperf3(&stage.parts.iperf3, 6, options)?;
        let mut client = client.stdout(Stdio::null()).spawn()?;
        sleep(Duration::from_secs(3));
        let before = stage.counts()?;
        sleep(Duration::from_secs(2));
        let after = stage.counts()?;
        client.wait()?;
        let buffers = after.1 - before.1;
        if buffers < 100.0 {
            return Err(format!("only {buffers} buffers in two seconds").into());
        }
        Ok((after.0 - before.0) * 1000.0 / buffers)
    }
}

/// MiB a second that arrived, of what iperf3 prints.
fn rate(json: &[u8]) -> Result<f64, Box<dyn Error>> {
    let said: serde_json::Value = serde_json::from_slice(json)?;
    if let Some(error) = said["error"].as_str() {
        return Err(format!("iperf3: {error}").into());
    }
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
    let bits = bits.filter(|bits| *bits > 0.0);
    Ok(bits.ok_or("iperf3 received nothing")? / 8.0 / f64::from(1 << 20))
}

/// Sends a byte on each of these and waits for it to come back, again and again; how often within that time
/// after [`OMITTED_OF_TURN`], all together.
fn ask_all(streams: &mut [TcpStream], how_long: Duration) -> Result<u32, Box<dyn Error>> {
    let start = Instant::now();
    thread::scope(|scope| {
        let ask = |stream| scope.spawn(move || ask(stream, start, how_long));
        let askers: Vec<_> = streams.iter_mut().map(ask).collect();
        let mut count = 0;
        for asker in askers {
            count += asker.join().map_err(|_| "an asker panicked")??;
        }
        Ok(count)
    })
}

fn connect(echo: SocketAddr) -> Result<TcpStream, Box<dyn Error>> {
    let deadline = Instant::now() + PATIENCE;
    let stream = loop {
        match TcpStream::connect(echo) {
            // The echo of the last client ends and begins anew.
            Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(100)),
            result => break result?,
        }
    };
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream, start: Instant, how_long: Duration) -> io::Result<u32> {
    let counted = OMITTED_OF_TURN..OMITTED_OF_TURN + how_long;
    let mut count = 0;
    while start.elapsed() < counted.end {
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
        count += u32::from(counted.contains(&start.elapsed()));
    }
    Ok(count)
}

impl Networks {
    /// The table that is printed.
    pub fn table(&self) -> String {
        let mut text = format!(
            "\nnested lane of one processor: {MEMORY_MIB} MiB, one vCPU, a tap interface with an MTU of 1500; QEMU with \
             vhost-net, and without\n"
        );
        for (at, (name, job)) in JOBS.iter().enumerate() {
            let [Some(rhyve), Some(vhost), Some(qemu)] =
                [&self.rhyve, &self.vhost, &self.qemu].map(|samples| samples.get(at))
            else {
                continue;
            };
            let show = |sample: &Sample| {
                format!("{:7.0}{:7.0}{:7.0}", sample.median, sample.min, sample.max)
            };
            let unit = match job {
                Job::Stream(_) => "MiB/s",
                Job::Answers(_) => "1/s",
            };
            text += &format!(
                "  {name:<33}{} |{} |{} {unit:<6}{:6.2}{:6.2}\n",
                show(rhyve),
                show(vhost),
                show(qemu),
                rhyve.ratio(vhost),
                rhyve.ratio(qemu)
            );
        }
        let [to, from] = self.exits_per_thousand;
        text += &format!(
            "  exits to rhyve, 1000 buffers     {to:7.2} to the guest, {from:.2} from it\n  \
             resident beyond RAM, disk and net{:7.2} MiB | QEMU without vhost: {:.2} MiB\n",
            self.rhyve_mib, self.qemu_mib
        );
        text + "\n  columns: rhyve's median, least, most | QEMU's with vhost | QEMU's without; unit; \
                medians of the rounds' ratios\n"
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    #[test]
    fn iperf3s_rate_is_what_arrived() {
        let json = br#"{"end": {"sum_received": {"bits_per_second": 8388608.0}}}"#;
        assert_eq!(rate(json).unwrap(), 1.0);
        let error = rate(br#"{"error": "unable to connect"}"#).unwrap_err();
        assert_eq!(error.to_string(), "iperf3: unable to connect");
        assert!(rate(br#"{"end": {}}"#).is_err());
        assert!(rate(b"").is_err());
    }

    #[test]
    fn answers_are_counted() {
        let (mut echoes, mut served) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            echoes.push(listener.local_addr().unwrap());
            served.push(thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let (mut byte, mut count) = ([0], 0_u32);
                while stream.read_exact(&mut byte).is_ok() {
                    stream.write_all(&byte).unwrap();
                    count += 1;
                }
                count
            }));
        }
        let streams = echoes.into_iter().map(|echo| connect(echo).unwrap());
        let mut streams: Vec<_> = streams.collect();
        let counts = [(); 2].map(|()| ask_all(&mut streams, Duration::from_millis(20)).unwrap());
        drop(streams);
        let served: u32 = served.into_iter().map(|echo| echo.join().unwrap()).sum();
        assert!(!counts.contains(&0), "{counts:?}");
        assert!(
            counts.iter().sum::<u32>() < served,
            "{counts:?} of {served}"
        );
    }
}
