//! The boot menu: what it looks like, and what its keys do (the seed's, sys/boot/forth/menu.rc of
//! 9.0).
//!
//! A [`Menu`] is made of the loader's variables; its options are variables again.

use super::env::Environment;
use crate::source::{BootFs, FileKind};
use crate::terminal::Key;

/// The banner, and the picture to the right of the menu.
const BRAND: &str = r"
  ______               ____   _____ _____
 |  ____|             |  _ \ / ____|  __ \
 | |___ _ __ ___  ___ | |_) | (___ | |  | |
 |  ___| '__/ _ \/ _ \|  _ < \___ \| |  | |
 | |   | | |  __/  __/| |_) |____) | |__| |
 | |   | | |    |    ||     |      |      |
 |_|   |_|  \___|\___||____/|_____/|_____/
";
const ORB: [&str; 15] = [
    "```                        `",
    "s` `.....---.......--.```   -/",
    "+o   .--`         /y:`      +.",
    "yo`:.            :o      `+-",
    " y/               -/`   -o/",
    ".-                  ::/sy+:.",
    "/                     `--  /",
    "`:                          :`",
    "`:                          :`",
    " /                          /",
    " .-                        -.",
    "  --                      -.",
    "   `:`                  `:`",
    "     .--             `--.",
    "        .---.....----.",
];

/// Columns between the frame's sides.
const WIDTH: usize = 41;

/// What safe mode sets (sys/boot/forth/menu-commands.4th).
const SAFE: [(&str, &str); 7] = [
    ("kern.smp.disabled", "1"),
    ("hw.ata.ata_dma", "0"),
    ("hw.ata.atapi_dma", "0"),
    ("hw.ata.wc", "0"),
    ("hw.eisa_slots", "0"),
    ("kern.eventtimer.periodic", "1"),
    ("kern.geom.part.check_integrity", "0"),
];

/// More kernels are not offered.
const KERNELS_MAX: usize = 9;

/// What a key leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Boots.
    Boot,
    /// Goes to the prompt.
    Prompt,
    /// Starts again.
    Reboot,
    /// Something is different now, and to be shown.
    Changed,
    /// Another kernel is wanted.
    Kernel,
    /// Nothing.
    None,
}

/// The menu.
#[derive(Clone, Debug)]
pub struct Menu {
    safe: bool,
    single: bool,
    verbose: bool,
    /// What safe mode replaced.
    before: Vec<(&'static str, Option<String>)>,
    /// Kernels to choose from, the chosen one first of all.
    kernels: Vec<String>,
    kernel: usize,
    brand: bool,
    orb: bool,
}

impl Menu {
    /// The menu for what is configured.
    pub fn new(fs: &dyn BootFs, env: &Environment) -> Self {
        let kernels = kernels(fs, env);
        let wanted = |name: &str| env.get(name) != Some("none") && env.get(name) != Some("NO");
        Self {
            safe: false,
            single: env.get("boot_single").is_some(),
            verbose: env.get("boot_verbose").is_some(),
            before: Vec::new(),
            kernels,
            kernel: 0,
            brand: wanted("loader_brand"),
            orb: wanted("loader_logo"),
        }
    }

    /// The chosen kernel.
    pub fn kernel(&self) -> Option<&str> {
        self.kernels.get(self.kernel).map(String::as_str)
    }

    /// Takes a key.
    pub fn press(&mut self, key: Key, env: &mut Environment) -> Choice {
        match key {
            Key::Enter | Key::Char('1' | 'b' | 'B') => Choice::Boot,
            Key::Escape | Key::Interrupt | Key::Char('2' | 'e' | 'E') => Choice::Prompt,
            Key::Char('3' | 'r' | 'R') => Choice::Reboot,
            Key::Char('4' | 'm' | 'M') => {
                self.toggle_safe(env);
                Choice::Changed
            }
            Key::Char('5' | 's' | 'S') => {
                self.single = toggle(env, "boot_single", self.single);
                Choice::Changed
            }
            Key::Char('6' | 'v' | 'V') => {
                self.verbose = toggle(env, "boot_verbose", self.verbose);
                Choice::Changed
            }
            Key::Char('7' | 'k' | 'K') if self.kernels.len() > 1 => {
                self.kernel = (self.kernel + 1) % self.kernels.len();
                if let Some(kernel) = self.kernels.get(self.kernel) {
                    env.force("kernel", kernel);
                }
                Choice::Kernel
            }
            _ => Choice::None,
        }
    }

    fn toggle_safe(&mut self, env: &mut Environment) {
        self.safe = !self.safe;
        if self.safe {
            for (name, value) in SAFE {
                self.before.push((name, env.get(name).map(str::to_owned)));
                env.force(name, value);
            }
            return;
        }
        for (name, value) in std::mem::take(&mut self.before) {
            match value {
                Some(value) => env.force(name, &value),
                None => env.unset(name),
            }
        }
    }

    /// All of it, with lines that end in a newline.
    pub fn draw(&self) -> String {
        let option = |set: bool| if set { "YES" } else { "NO" };
        let mut items = vec![
            String::new(),
            "1. Boot [ENTER]".to_owned(),
            "2. [Esc]ape to loader prompt".to_owned(),
            "3. Reboot".to_owned(),
            String::new(),
            "Options:".to_owned(),
            format!("4. Boot Safe [M]ode: {}", option(self.safe)),
            format!("5. Boot [S]ingle User: {}", option(self.single)),
            format!("6. Boot [V]erbose: {}", option(self.verbose)),
        ];
        if let (Some(kernel), 2..) = (self.kernel(), self.kernels.len()) {
            let (number, count) = (self.kernel + 1, self.kernels.len());
            let kernel: String = kernel.chars().take(12).collect();
            items.push(format!("7. [K]ernel: {kernel} ({number} of {count})"));
        }
        items.push(String::new());
        let mut lines = vec![format!("+{:-^WIDTH$}+", "Welcome to FreeBSD")];
        lines.extend(
            items
                .iter()
                .map(|item| format!("|  {item:<0$}|", WIDTH - 2)),
        );
        lines.push(format!("+{}+", "-".repeat(WIDTH)));
        let orb: &[&str] = if self.orb { &ORB } else { &[] };
        // The picture begins a line above the frame and ends below it.
        let blank = " ".repeat(WIDTH + 2);
        let mut text = if self.brand {
            BRAND.to_owned()
        } else {
            String::new()
        };
        for index in 0..orb.len().max(lines.len() + 1) {
            let line = index.checked_sub(1).and_then(|index| lines.get(index));
            let picture = orb.get(index).copied().unwrap_or_default();
            let line = format!(" {} {picture}", line.unwrap_or(&blank));
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

fn toggle(env: &mut Environment, name: &str, set: bool) -> bool {
    match set {
        true => env.unset(name),
        false => env.force(name, "YES"),
    }
    !set
}

/// The kernels to choose from: the configured one, those that `kernels` lists, and each directory
/// of `/boot` with a kernel in it, unless `kernels_autodetect` is `NO`.
fn kernels(fs: &dyn BootFs, env: &Environment) -> Vec<String> {
    let current = env.get("kernel").unwrap_or("kernel");
    let listed = env.get("kernels").unwrap_or_default();
    let listed = listed
        .split([' ', ',', ';'])
        .filter(|name| !name.is_empty());
    let mut found: Vec<String> = vec![current.to_owned()];
    found.extend(listed.map(str::to_owned));
    let detect = env.get("kernels_autodetect");
    if !detect.is_some_and(|value| value.eq_ignore_ascii_case("no")) {
        let bootfile = env.get("bootfile").unwrap_or("kernel");
        let bootfile = bootfile.split([';', ',']).next().unwrap_or("kernel");
        let entries = fs.read_dir("/boot").unwrap_or_default();
        let has_kernel = |name: &str| {
            ["", ".gz"].iter().any(|suffix| {
                let stat = fs.stat(&format!("/boot/{name}/{bootfile}{suffix}"));
                stat.is_ok_and(|stat| stat.kind == FileKind::File)
            })
        };
        let names = entries.into_iter().map(|entry| entry.name);
        found.extend(names.filter(|name| has_kernel(name)));
    }
    let mut kernels: Vec<String> = Vec::new();
    for kernel in found {
        if kernels.len() < KERNELS_MAX && !kernels.contains(&kernel) {
            kernels.push(kernel);
        }
    }
    kernels
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::source::dir::HostDir;

    fn menu() -> (Menu, Environment) {
        let tmp = tempfile::tempdir().unwrap();
        for name in ["kernel", "kernel.old", "modules"] {
            fs::create_dir_all(tmp.path().join("boot").join(name)).unwrap();
        }
        for name in ["kernel/kernel", "kernel.old/kernel.gz"] {
            fs::write(tmp.path().join("boot").join(name), "").unwrap();
        }
        let mut env = Environment::default();
        env.set("boot_verbose", "");
        env.set("hw.ata.wc", "1");
        (Menu::new(&HostDir::new(tmp.path()).unwrap(), &env), env)
    }

    #[test]
    fn options_are_variables_and_go_back() {
        let (mut menu, mut env) = menu();
        let before = env.clone();
        let all = |key: &str| key.chars().map(Key::Char).collect::<Vec<_>>();
        for key in all("4sV") {
            assert_eq!(menu.press(key, &mut env), Choice::Changed);
        }
        assert_eq!(env.get("kern.smp.disabled"), Some("1"));
        assert_eq!(env.get("hw.ata.wc"), Some("0"));
        assert_eq!(env.get("boot_single"), Some("YES"));
        assert_eq!(env.get("boot_verbose"), None);
        let shown = menu.draw();
        for line in ["Safe [M]ode: YES", "[S]ingle User: YES", "[V]erbose: NO"] {
            assert!(shown.contains(line), "{shown}");
        }
        for key in all("M56") {
            menu.press(key, &mut env);
        }
        assert_eq!(env.get("boot_verbose"), Some("YES"));
        assert_eq!(env.iter().count(), before.iter().count());
        assert_eq!(env.get("hw.ata.wc"), Some("1"));
    }

    #[test]
    fn kernels_take_turns() {
        let (mut menu, mut env) = menu();
        assert!(menu.draw().contains("7. [K]ernel: kernel (1 of 2)"));
        assert_eq!(menu.press(Key::Char('k'), &mut env), Choice::Kernel);
        assert_eq!(env.get("kernel"), Some("kernel.old"));
        assert!(menu.draw().contains("kernel.old (2 of 2)"));
        menu.press(Key::Char('7'), &mut env);
        assert_eq!(menu.kernel(), Some("kernel"));
    }

    #[test]
    fn it_fits_on_a_terminal() {
        let (menu, _) = menu();
        let shown = menu.draw();
        assert!(shown.lines().all(|line| line.len() < 80), "{shown}");
        assert!(shown.lines().count() <= 24, "{shown}");
    }
}
