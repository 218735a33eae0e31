// Package install makes a node use Lazuli, and makes it as it was.
//
// In goes what the node has: containerd, its configuration, systemd. Out come the program in a place that stays, a
// systemd unit, and a file beside containerd's configuration, with one line in the main file if that does not
// import such files yet. containerd itself says what it makes of them (containerd config dump), and
// nothing is written that would change more of its effective configuration than the snapshotter needs.
//
// Everything is planned before anything is changed, each change is printed when it is made, what
// cannot be finished is undone, and a second run changes nothing. The unit lists, in comments, what was
// made for it, so that Uninstall leaves behind no more than there was.
//
// A node on which Lazuli is deleted without Uninstall still starts containerd: that connects to a
// snapshotter when it is first used, and the imported file is named by a pattern, which may match nothing.
//
// Nothing here is for concurrent use: two of them at once may undo each other's work.
package install

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	unitName   = "lazuli.service"
	unitFile   = "/etc/systemd/system/" + unitName
	runDir     = "/run/lazuli"
	backupFile = mainFile + ".before-lazuli"
	madeMark   = "# made: "
)

//go:embed lazuli.service
var unitTemplate string

// Options say where and what. The zero value installs on this node, for ctr and nerdctl.
type Options struct {
	// Root is the folder with all that the node keeps, /var/lib/lazuli if empty.
	Root string
	// Socket is where the daemon will listen for containerd, /run/lazuli/lazuli.sock if empty.
	Socket string
	// Args are given to lazuli daemon.
	Args []string
	// DestDir is a directory that stands for /, of an image that is being made. Nothing is started or loaded.
	DestDir string
	// Bin is the directory that the program is copied to, unless it runs from there or from /usr/bin. /usr/local/bin if empty.
	Bin string
	// CRI makes Kubernetes' images use Lazuli.
	CRI bool
	// NoContainerd leaves containerd's configuration alone.
	NoContainerd bool
	// Restart restarts containerd.
	Restart bool
	// DryRun prints what would be done, and what would be written, and changes nothing.
	DryRun bool
	// Force uninstalls although containers run.
	Force bool
	// Purge makes Uninstall remove Root, too.
	Purge bool

	systemd bool // whatever DestDir is, there is a systemctl
}

func (o Options) withDefaults() (Options, error) {
	for _, d := range []struct {
		v  *string
		to string
	}{{&o.Root, "/var/lib/lazuli"}, {&o.Socket, runDir + "/lazuli.sock"}, {&o.Bin, "/usr/local/bin"}} {
		if *d.v == "" {
			*d.v = d.to
		}
		if !filepath.IsAbs(*d.v) {
			return o, fmt.Errorf("%s: want an absolute path", *d.v)
		}
		*d.v = filepath.Clean(*d.v)
	}
	if o.DestDir != "" {
		var err error
		if o.DestDir, err = filepath.Abs(o.DestDir); err != nil {
			return o, err
		}
	}
	for _, a := range append(o.Args, o.Bin) {
		// systemd gives these a meaning in a command line.
		if a == "" || strings.ContainsAny(a, " \t\n\"'\\%$;") {
			return o, fmt.Errorf("%q: cannot stand in a systemd unit", a)
		}
	}
	return o, nil
}

// at is where a path of the node lies.
func (o Options) at(path string) string { return filepath.Join(o.DestDir, path) }

// booted says whether there is a systemd to talk to.
func (o Options) booted() bool {
	_, err := os.Stat("/run/systemd/system") // sd_booted(3)
	return o.DestDir == "" && err == nil || o.systemd
}

// Install makes the node use Lazuli. It prints to w what it does.
func Install(ctx context.Context, w io.Writer, o Options) error {
	o, err := o.withDefaults()
	if err != nil {
		return err
	}
	if err := mayWrite(o); err != nil {
		return err
	}
	p, err := planInstall(ctx, o)
	if err != nil {
		return err
	}
	if err := carryOut(ctx, w, o.DryRun, p.steps); err != nil {
		return err
	}
	switch {
	case o.DryRun:
		fmt.Fprintln(w, "this was a dry run: nothing was changed")
	case o.DestDir != "":
		fmt.Fprintf(w, "not enabled yet: systemctl --root=%s enable %s\n", o.DestDir, unitName)
	case !o.booted():
		fmt.Fprintf(w, "there is no systemd here: run %s, and start containerd again\n", p.daemon)
	case !o.Restart && p.configured:
		fmt.Fprintln(w, "containerd reads its configuration when it starts: systemctl restart containerd (containers go on running)")
	}
	return nil
}

// An installPlan is a plan, and what the user is told after it.
type installPlan struct {
	plan
	daemon     string // the daemon's command line
	configured bool   // containerd's configuration is changed
}

func planInstall(ctx context.Context, o Options) (*installPlan, error) {
	p := &installPlan{}
	var m *merge
	if !o.NoContainerd {
		c, err := find(ctx, o.DestDir)
		if err != nil {
			return nil, err
		}
		if m, err = c.merge(ctx, wish{socket: o.Socket, root: o.Root, cri: o.CRI}); err != nil {
			return nil, err
		}
		p.add(step{said: fmt.Sprintf("found containerd %s (%s)", c.version, c.program)})
	}
	oldUnit, err := read(o.at(unitFile))
	if err != nil {
		return nil, err
	}
	if oldUnit.exists && !bytes.HasPrefix(oldUnit.content, []byte(written)) {
		return nil, fmt.Errorf("%s was not written by lazuli install: move it away first", o.at(unitFile))
	}

	files := &plan{}
	if err := files.makeDirs(filepath.Dir(o.at(unitFile)), 0o755); err != nil {
		return nil, err
	}
	n := len(files.steps)
	program, upgraded, err := o.program(files)
	if err != nil {
		return nil, err
	}
	if err := files.makeDirs(o.at(o.Root), 0o711); err != nil {
		return nil, err
	}
	if m != nil {
		if p.configured, err = o.configure(files, m); err != nil {
			return nil, err
		}
	}
	made := made(oldUnit.content)
	for _, path := range files.made {
		if path = strings.TrimPrefix(path, o.DestDir); !slices.Contains(made, path) {
			made = append(made, path)
		}
	}
	p.daemon = strings.Join(append([]string{program, "daemon"}, o.Args...), " ")
	unit, err := write(o.at(unitFile), unitText(p.daemon, made), 0o644)
	if err != nil {
		return nil, err
	}
	// The unit is written before what it lists, so that nothing is forgotten if this process dies halfway.
	files.steps = slices.Insert(files.steps, n, unit)

	// What is to be undone last comes first.
	restarted := false
	if o.booted() {
		p.add(step{do: nothing, undo: func(ctx context.Context) error {
			if !restarted {
				return nil
			}
			return systemctl("restart", "containerd.service")(ctx)
		}})
		if unit.do != nil {
			p.add(step{do: nothing, undo: systemctl("daemon-reload")})
		}
	}
	p.add(files.steps...)
	if o.booted() {
		p.add(start(ctx, unit.do != nil, upgraded)...)
		if o.Restart {
			p.add(step{said: "restarted containerd.service", do: func(ctx context.Context) error {
				restarted = true
				return systemctl("restart", "containerd.service")(ctx)
			}})
		}
	}
	return p, nil
}

func nothing(context.Context) error { return nil }

func mayWrite(o Options) error {
	if !o.DryRun && o.DestDir == "" && os.Geteuid() != 0 {
		return errors.New("this changes the node and needs root: run it with sudo, or look first with --dry-run")
	}
	return nil
}

// program plans the copy of this program, and returns its path on the node, and whether another lies there now.
func (o Options) program(p *plan) (path string, upgraded bool, err error) {
	self, err := os.Executable()
	if err == nil {
		self, err = filepath.EvalSymlinks(self)
	}
	if err != nil {
		return "", false, err
	}
	if dir := filepath.Dir(self); o.DestDir == "" && (dir == o.Bin || dir == "/usr/bin") {
		return self, false, nil
	}
	path = filepath.Join(o.Bin, "lazuli")
	content, err := os.ReadFile(self)
	if err != nil {
		return "", false, err
	}
	if err := p.makeDirs(o.at(o.Bin), 0o755); err != nil {
		return "", false, err
	}
	_, err = os.Lstat(o.at(path))
	upgraded = err == nil
	s, err := write(o.at(path), content, 0o755)
	if err != nil {
		return "", false, err
	}
	if !upgraded {
		p.made = append(p.made, o.at(path))
	}
	p.add(s)
	return path, upgraded && s.do != nil, nil
}

// configure plans containerd's files, and says whether any of them changes.
func (o Options) configure(p *plan, m *merge) (changed bool, err error) {
	dropIn := o.at(m.dropIn)
	if err := p.makeDirs(filepath.Dir(dropIn), 0o755); err != nil {
		return false, err
	}
	s, err := write(dropIn, m.content, 0o644)
	if err != nil {
		return false, err
	}
	p.add(s)
	if m.main == nil {
		p.add(step{said: "unchanged " + o.at(mainFile)})
		return s.do != nil, nil
	}
	main, err := read(o.at(mainFile))
	if err != nil {
		return false, fmt.Errorf("%w: let it say imports = [%q], and run lazuli install again", err, importPattern)
	}
	if !main.exists {
		p.made = append(p.made, o.at(mainFile))
	} else if _, err := os.Lstat(o.at(backupFile)); errors.Is(err, fs.ErrNotExist) {
		p.add(replace("wrote "+o.at(backupFile), o.at(backupFile), file{}, main).quiet())
	}
	// The line comes last: it does nothing without the file, and the file nothing without it.
	line, err := write(o.at(mainFile), m.main, 0o644)
	if err != nil {
		return false, err
	}
	p.add(line)
	return true, nil
}

// quiet is the step without what it writes.
func (s step) quiet() step {
	s.show = ""
	return s
}

// unitText is the unit that runs a command line, with the paths of what was made for it.
func unitText(daemon string, made []string) []byte {
	var b strings.Builder
	b.WriteString(written)
	b.WriteString("# Settings of your own: systemctl edit lazuli\n")
	for _, path := range made {
		b.WriteString(madeMark + path + "\n")
	}
	b.WriteString(strings.ReplaceAll(unitTemplate, "@DAEMON@", daemon))
	return []byte(b.String())
}

// made are the paths that a unit lists as made, on the node, those that hold others first.
func made(unit []byte) []string {
	var out []string
	for _, l := range lines(unit) {
		if path, ok := strings.CutPrefix(l, madeMark); ok && filepath.IsAbs(path) {
			out = append(out, filepath.Clean(path))
		}
	}
	return out
}

// start are the steps that make systemd run the unit as it is now.
func start(ctx context.Context, newUnit, upgraded bool) []step {
	var out []step
	if newUnit {
		out = append(out, step{said: "reloaded systemd", do: systemctl("daemon-reload")})
	}
	enabled := systemctl("is-enabled", "--quiet", unitName)(ctx) == nil
	active := systemctl("is-active", "--quiet", unitName)(ctx) == nil
	switch {
	case !enabled || !active:
		if !enabled {
			// Before it, because what does not come up is enabled all the same.
			out = append(out, step{do: nothing, undo: systemctl("disable", "--now", unitName)})
		}
		return append(out, step{said: "enabled and started " + unitName, do: systemctl("enable", "--now", unitName)})
	case upgraded:
		return append(out, step{said: "reloaded " + unitName + ": it runs the new program now", do: systemctl("reload", unitName)})
	}
	return append(out, step{said: "unchanged " + unitName + ": enabled and running"})
}

// systemctl is what calls systemctl with args.
func systemctl(args ...string) func(context.Context) error {
	return func(ctx context.Context) error {
		out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("systemctl %s: %w", strings.Join(args, " "), err)
			if said := bytes.TrimSpace(out); len(said) > 0 {
				err = fmt.Errorf("%w: %s", err, said)
			}
		}
		return err
	}
}

// Uninstall makes the node as it was before Install. Images, and what was fetched of them, stay in Root unless Purge is set.
// While containers use Lazuli it refuses, unless Force is set. It prints to w what it does.
func Uninstall(ctx context.Context, w io.Writer, o Options) error {
	o, err := o.withDefaults()
	if err != nil {
		return err
	}
	if err := mayWrite(o); err != nil {
		return err
	}
	unit, err := read(o.at(unitFile))
	if err != nil {
		return err
	}
	if unit.exists && !bytes.HasPrefix(unit.content, []byte(written)) {
		return fmt.Errorf("%s was not written by lazuli install: remove it by hand", o.at(unitFile))
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	p := &plan{}
	if o.DestDir == "" || o.systemd {
		mounts, err := mountsBelow(o.at(o.Root))
		if err != nil {
			return err
		}
		if running := slices.DeleteFunc(slices.Clone(mounts), func(m mount) bool { return m.kind != "overlay" }); len(running) > 0 && !o.Force {
			return fmt.Errorf("%d root file systems of containers are mounted below %s (%s, …): stop and remove the containers first, or use --force",
				len(running), o.Root, running[0].point)
		}
		if o.booted() && unit.exists {
			s := step{said: "stopped and disabled " + unitName, do: systemctl("disable", "--now", unitName)}
			if systemctl("is-enabled", "--quiet", unitName)(ctx) == nil {
				s.undo = systemctl("enable", "--now", unitName)
			}
			p.add(s)
		} else if answers(o.Socket) && !o.Force {
			return fmt.Errorf("a daemon answers at %s: end it first (lazuli daemon --teardown), or use --force", o.Socket)
		}
		// What was mounted for containers, and the process that holds their connection to the kernel.
		if _, err := os.Stat(o.at(runDir)); err == nil || len(mounts) > 0 {
			p.add(step{said: "took down what the daemon left below " + o.Root, do: func(ctx context.Context) error {
				cmd := exec.CommandContext(ctx, program, append([]string{"daemon", "--teardown"}, o.Args...)...)
				cmd.Stdout, cmd.Stderr = w, w
				if err := cmd.Run(); err != nil {
					return fmt.Errorf("lazuli daemon --teardown: %w", err)
				}
				return nil
			}})
		}
	}
	configured := false
	if !o.NoContainerd {
		n := len(p.steps)
		if err := o.deconfigure(p, made(unit.content)); err != nil {
			return err
		}
		configured = len(p.steps) > n
	}
	s, err := remove(o.at(unitFile))
	if err != nil {
		return err
	}
	p.add(s)
	if o.booted() && s.do != nil {
		p.add(step{said: "reloaded systemd", do: systemctl("daemon-reload"), undo: systemctl("daemon-reload")})
	}
	if o.booted() && o.Restart {
		p.add(step{said: "restarted containerd.service", do: systemctl("restart", "containerd.service")})
	}
	made := made(unit.content)
	slices.Reverse(made)
	var dirs []step
	for _, path := range made {
		switch st, err := os.Lstat(o.at(path)); {
		case err != nil || path == mainFile: // see deconfigure
		case st.IsDir():
			dirs = append(dirs, removeEmpty(o.at(path)))
		default:
			s, err := remove(o.at(path))
			if err != nil {
				return err
			}
			p.add(s)
		}
	}
	// What follows cannot be undone.
	root := o.at(o.Root)
	if entries, err := os.ReadDir(root); err == nil && o.Purge {
		p.add(step{said: "removed " + root, do: func(context.Context) error {
			left, err := mountsBelow(root)
			if err == nil && len(left) > 0 {
				err = fmt.Errorf("%s is still mounted: %s stays", left[0].point, root)
			}
			if err != nil {
				return err
			}
			return os.RemoveAll(root)
		}})
	} else if len(entries) > 0 {
		p.add(step{said: "kept " + root + ": remove it with --purge"})
	}
	if _, err := os.Stat(o.at(runDir)); err == nil {
		p.add(step{said: "removed " + o.at(runDir), do: func(context.Context) error { return os.RemoveAll(o.at(runDir)) }})
	}
	p.add(dirs...)
	if len(p.steps) == 0 || !unit.exists && !slices.ContainsFunc(p.steps, func(s step) bool { return s.do != nil }) {
		p.add(step{said: "nothing is installed here"})
	}
	if err := carryOut(ctx, w, o.DryRun, p.steps); err != nil {
		return err
	}
	switch {
	case o.DryRun:
		fmt.Fprintln(w, "this was a dry run: nothing was changed")
	case configured && o.DestDir == "" && !(o.Restart && o.booted()):
		fmt.Fprintln(w, "containerd forgets the snapshotter when it is restarted: systemctl restart containerd (containers go on running)")
	}
	return nil
}

// deconfigure plans to take back what configure wrote, wherever it lies.
func (o Options) deconfigure(p *plan, made []string) error {
	dropIns := []string{dropInFile}
	c := &containerd{dest: o.DestDir}
	files, err := c.load(nil)
	if err != nil {
		// The configuration is broken, so containerd does not read it either; our lines can be taken out all the same.
		files = nil
	}
	for _, f := range files {
		if filepath.Base(f.path) == filepath.Base(dropInFile) && !slices.Contains(dropIns, f.path) {
			dropIns = append(dropIns, f.path)
		}
	}
	main, err := read(o.at(mainFile))
	if err != nil && !main.exists {
		// A symbolic link was never changed.
		main = file{}
	}
	if without := withoutBlock(main.content); main.exists && !bytes.Equal(without, main.content) {
		now := main
		now.content = without
		said := "wrote " + o.at(mainFile)
		if slices.Contains(made, mainFile) && versionLine.Match(without) {
			now, said = file{}, "removed "+o.at(mainFile)
		}
		p.add(replace(said, o.at(mainFile), main, now))
		if backup, err := read(o.at(backupFile)); err == nil && backup.exists {
			if bytes.Equal(backup.content, without) {
				p.add(replace("removed "+o.at(backupFile), o.at(backupFile), backup, file{}).quiet())
			} else {
				p.add(step{said: "kept " + o.at(backupFile) + ": " + mainFile + " was changed since"})
			}
		}
	}
	for _, path := range dropIns {
		f, err := read(o.at(path))
		if err != nil {
			return err
		}
		if f.exists && bytes.HasPrefix(f.content, []byte(written)) {
			p.add(replace("removed "+o.at(path), o.at(path), f, file{}))
		}
	}
	return nil
}

// answers says whether somebody listens at a socket.
func answers(socket string) bool {
	c, err := net.Dial("unix", socket)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// A mount is a mount point and its file system.
type mount struct{ point, kind string }

// mountsBelow returns the mounts at dir and below.
func mountsBelow(dir string) ([]mount, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []mount
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for _, l := range lines(b) {
		// ID PARENT DEVICE ROOT POINT OPTIONS [TAGS] - KIND SOURCE OPTIONS, see proc_pid_mountinfo(5)
		left, right, ok := strings.Cut(l, " - ")
		f, g := strings.Fields(left), strings.Fields(right)
		if !ok || len(f) < 5 || len(g) < 1 {
			return nil, fmt.Errorf("mountinfo: %w: %q", unix.EINVAL, l)
		}
		if point := unescape.Replace(f[4]); point == dir || strings.HasPrefix(point, dir+"/") {
			out = append(out, mount{point, g[0]})
		}
	}
	return out, nil
}
