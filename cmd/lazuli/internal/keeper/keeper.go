// Package keeper is the process that holds what must outlive the server, and keeps a server running.
//
// Three processes share the work. The *keeper* ([Run]) is what systemd starts. It holds descriptors and one
// child, the *server* ([Inherit]), which does everything else. When the server dies, the next one gets the same
// descriptors, and who waits for it only waits longer. When the keeper stops while a mount is in use, it
// leaves the FUSE connection to a *holder* ([Hold]), which does nothing until the next keeper comes for it. So it does
// while it becomes a newer program.
//
// What is held, by name: "fuse", the connection of the FUSE mount (/dev/fuse); "init", a memfd with the kernel's first request on
// it, without which the connection is of no use; and the listening sockets of [Options.Sockets].
//
// Descriptors are passed in one way everywhere, that of sd_listen_fds(3): open across exec, and
// named in the environment. systemd's descriptor store gives them to a new keeper so, a keeper to its child,
// and a keeper to itself when it becomes a newer program. (A child cannot be told its process number before
// it is there, so the variable is LAZULI_FDS and not LISTEN_FDS.) Only towards a keeper or a holder that runs already
// they go over a socket. All are closed on exec, except in the child that they are for.
//
// There is never more than one server at a connection, since one would answer what the other was asked:
// a server dies with its keeper (PR_SET_PDEATHSIG), and the next one waits for its end (a lock on "init").
//
// No descriptor of FUSE is ever an [os.File] here: the runtime would put it into its poller, see package serve.
package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Options are what a keeper is to keep.
type Options struct {
	// Command starts the server. Its program is looked up at every start, so that a binary that was replaced is the new one.
	Command []string
	// Sockets are the Unix sockets to listen on for the server: paths by name. A name has no "=" or ":" and is
	// not one of the package's own.
	Sockets map[string]string
	// Holder is the path of the socket where a holder waits for the next keeper, and HoldCommand starts one.
	Holder      string
	HoldCommand []string
	// InUse reports whether a mount that others use needs the FUSE connection, so that it must not end with the
	// keeper. It is asked when the server is gone. Nil says yes, as long as there is a connection.
	InUse func() bool
	// Logger is told when a server ends. Nil is silent.
	Logger *slog.Logger
}

// ExitConfig is the exit code of a server that would only end in the same way again (EX_CONFIG of sysexits.h).
const ExitConfig = 78

// ErrConfig is [Run]'s error when the first server ended with [ExitConfig].
var ErrConfig = errors.New("the server does not start with this configuration, see what it said")

// stopTimeout is how long a server has to end when it is asked to. Readers lose nothing if it is killed.
var stopTimeout = 10 * time.Second

const (
	// A server that dies younger than this is not started again at once for ever.
	young = 3 * time.Second
	// The pause doubles from the shortest to the longest. Behind a server that came up readers wait, so what it
	// costs to start one (about 50 ms) is the limit, not patience.
	shortest     = 10 * time.Millisecond
	longest      = 5 * time.Second
	longestReady = 100 * time.Millisecond
)

// Names of descriptors, beside those of Options.Sockets.
const (
	fuseName   = "fuse"
	initName   = "init"
	keeperName = "keeper" // a child's end of the socket pair that it speaks to its keeper over
	holderName = "holder" // where a holder listens
)

type wish int

// The later one counts more.
const (
	nothing wish = iota
	upgrade
	stop
)

type keeper struct {
	Options
	log      *slog.Logger
	path     string         // of this program
	systemd  string         // the socket of sd_notify(3), "" without systemd
	held     map[string]int // descriptors by name
	stops    chan os.Signal // each has room for one: of many signals of a kind, one counts
	upgrades chan os.Signal
	asked    wish
	served   bool // a server was ready once
}

// Run is the keeper: it starts the server, and starts it again when it has died, until SIGTERM or SIGINT comes or ctx ends. On
// SIGHUP it stops the server and becomes what is installed now at this program's path, with the same process number.
//
// The FUSE connection comes from systemd's descriptor store, else from a holder; if there is none, the server mounts
// anew. Listening sockets come from systemd or are made, with mode 0600. At the end their files are removed, except with systemd,
// which holds them if it is about to start the next keeper.
//
// A server has 10 seconds to end after SIGTERM. The process is Run's: nothing else in it forks, or
// catches these signals.
func Run(ctx context.Context, o Options) error {
	// The kernel sends a child its PDEATHSIG when the *thread* that started it ends. Threads of Go's runtime end only with
	// a goroutine that is locked to one, so this one starts every child, and outlives it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	k := &keeper{
		Options:  o,
		log:      o.Logger,
		systemd:  os.Getenv("NOTIFY_SOCKET"),
		stops:    make(chan os.Signal, 1),
		upgrades: make(chan os.Signal, 1),
	}
	if k.log == nil {
		k.log = slog.New(slog.DiscardHandler)
	}
	signal.Notify(k.stops, unix.SIGTERM, unix.SIGINT)
	defer signal.Stop(k.stops)
	signal.Notify(k.upgrades, unix.SIGHUP)
	defer signal.Stop(k.upgrades)
	defer context.AfterFunc(ctx, func() {
		select {
		case k.stops <- unix.SIGTERM:
		default:
		}
	})()
	// Whoever catches SIGPIPE is not killed by it when nobody reads its log any more.
	pipes := make(chan os.Signal, 1)
	signal.Notify(pipes, unix.SIGPIPE)
	defer signal.Stop(pipes)

	var err error
	if k.path, err = program(); err != nil {
		return err
	}
	if k.held, err = inherited(); err != nil {
		return err
	}
	if err = k.gather(); err == nil {
		err = k.keep()
	}
	return errors.Join(err, k.leave())
}

// program returns the path at which this program was started: a link is not followed, so that it can lead to another one
// when it is looked up again.
func program() (string, error) {
	path, err := exec.LookPath(os.Args[0])
	if err != nil {
		return os.Executable()
	}
	return filepath.Abs(path)
}

// gather completes what was inherited.
func (k *keeper) gather() error {
	k.prune()
	k.relieve()
	for _, name := range []string{fuseName, initName} {
		k.store(name)
	}

	for name, fd := range k.held {
		if name == fuseName || name == initName {
			continue
		}
		if path, ok := k.Sockets[name]; !ok || !listens(fd, path) {
			k.drop(name)
		}
	}
	for name, path := range k.Sockets {
		if _, ok := k.held[name]; !ok {
			fd, err := listen(path, unix.SOCK_STREAM)
			if err != nil {
				return err
			}
			k.held[name] = fd
		}
		k.store(name)
	}
	return nil
}

// relieve takes the FUSE connection from a holder, if there is one, which then ends.
func (k *keeper) relieve() {
	held, thanks, err := takeFrom(k.Holder)
	if err != nil {
		k.log.Warn("the holder did not hand over the FUSE connection", "err", err)
	}
	if thanks == nil {
		return
	}
	defer thanks()
	// A keeper whose predecessor did not end as it should has the same one already.
	_, ours := k.held[fuseName]
	for name, fd := range held {
		if ours {
			unix.Close(fd)
			continue
		}
		k.held[name] = fd
		k.store(name)
	}
	k.prune()
}

// prune lets go of a FUSE connection that cannot be served any more.
func (k *keeper) prune() {
	fuse, ok := k.held[fuseName]
	_, ok2 := k.held[initName]
	if !ok || !ok2 || !connected(fuse) {
		k.drop(fuseName)
		k.drop(initName)
	}
}

// drop closes a descriptor, if it is held.
func (k *keeper) drop(name string) {
	if fd, ok := k.held[name]; ok {
		k.tell("FDSTOREREMOVE=1\nFDNAME=" + name)
		unix.Close(fd)
		delete(k.held, name)
	}
}

// store puts a descriptor, if it is held, into systemd's store, which keeps it once. Another one of that name is
// not replaced.
func (k *keeper) store(name string) {
	if fd, ok := k.held[name]; ok {
		// systemd would else watch for its end, and be woken by every request of FUSE.
		k.tell("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, fd)
	}
}

// tell tells systemd, if it is there. There is nothing better to do about an error than to go on.
func (k *keeper) tell(state string, fds ...int) {
	if k.systemd == "" {
		return
	}
	if err := notify(k.systemd, state, fds...); err != nil {
		k.log.Warn("systemd was not told", "state", state, "err", err)
	}
}

// ask notes what a signal asked for. Nothing takes back a stop.
func (k *keeper) ask(w wish) {
	if w <= k.asked {
		return
	}
	k.asked = w
	switch w {
	case upgrade:
		k.tell(reloading())
	case stop:
		k.tell("STOPPING=1")
	}
}

// keep has a server running until it is to stop.
func (k *keeper) keep() error {
	deaths := 0 // of young servers, one after the other
	for {
		if len(k.stops) > 0 {
			k.ask(stop)
		}
		var l life
		if k.asked == nothing {
			l = k.serve()
		}
		switch k.asked {
		case stop:
			return nil
		case upgrade:
			err := k.exec()
			k.asked = nothing
			if len(k.stops) == 0 {
				k.log.Error("not upgraded: the program that runs goes on", "err", err)
			}
			continue
		}
		if l.code == ExitConfig && !k.served {
			return ErrConfig
		}
		if l.lasted >= young {
			deaths = 0
		}
		pause := backoff(deaths, l.ready)
		deaths++
		k.log.Warn("the server ended and is started again", "err", l.err, "pause", pause)
		k.tell(fmt.Sprintf("STATUS=The server ended (%v) and is started again", l.err))
		k.sleep(pause)
	}
}

// backoff returns how long to wait after a server's death, when as many died young just before.
func backoff(deaths int, ready bool) time.Duration {
	most := longest
	if ready {
		most = longestReady
	}
	if deaths == 0 {
		return 0
	}
	return min(shortest<<min(deaths-1, 20), most)
}

func (k *keeper) sleep(d time.Duration) {
	for over := time.After(d); k.asked == nothing; {
		select {
		case <-k.stops:
			k.ask(stop)
		case <-k.upgrades:
			k.ask(upgrade)
		case <-over:
			return
		}
	}
}

// A life is what became of a server.
type life struct {
	ready  bool
	lasted time.Duration
	code   int   // with which it exited; else -1
	err    error // how it ended; never nil
}

// serve starts a server and returns when it has ended, by itself or because a signal asked for something else.
func (k *keeper) serve() life {
	k.prune()
	l := life{code: -1}
	begin := time.Now()
	p, err := start(k.Command, k.held, &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL})
	if err != nil {
		l.err = err
		return l
	}
	defer p.conn.Close()
	ended := make(chan life, 1)
	go func() { ended <- p.wait() }()
	var late <-chan time.Time
	for running, messages := true, p.messages; running || messages != nil; {
		select {
		case m, ok := <-messages:
			if !ok {
				messages = nil
				break
			}
			if m.text == "ready" {
				l.ready, k.served = true, true
			}
			p.answer(k.take(m))
		case end := <-ended:
			running = false
			l.code, l.err, l.lasted = end.code, end.err, time.Since(begin)
			// Its last words are there already, and then comes the end, unless a child of it has
			// its descriptors.
			p.conn.SetReadDeadline(time.Now().Add(time.Second))
		case <-k.stops:
			k.ask(stop)
		case <-k.upgrades:
			k.ask(upgrade)
		case <-late:
			k.log.Warn("the server did not end in time and is killed", "pid", p.Pid, "after", stopTimeout)
			p.Kill()
		}
		if k.asked != nothing && late == nil {
			p.Signal(unix.SIGTERM)
			late = time.After(stopTimeout)
		}
	}
	return l
}

// take does what a server asks for.
func (k *keeper) take(m message) error {
	switch verb, text := m.verb(); verb {
	case "keep":
		if len(m.fds) != 2 {
			for _, fd := range m.fds {
				unix.Close(fd)
			}
			return fmt.Errorf("%d descriptors came, not 2", len(m.fds))
		}
		for i, name := range []string{fuseName, initName} {
			k.drop(name)
			k.held[name] = m.fds[i]
			k.store(name)
		}
		return nil
	case "ready":
		k.tell("READY=1")
		return nil
	case "status":
		k.tell("STATUS=" + text)
		return nil
	}
	return fmt.Errorf("a message that is not known: %.20q", m.text)
}

// exec replaces this process's program by what its path leads to now. It returns only when that was not to be, with everything as it
// was.
//
// Meanwhile a holder has the FUSE connection too: the new program may turn out to be good for nothing, and Go's
// runtime lets a signal kill a process that has only just begun. It is also a test of the new program.
func (k *keeper) exec() error {
	if _, ok := k.held[fuseName]; ok {
		if err := k.hold(); err != nil {
			return err
		}
		defer k.relieve()
	}
	all := sorted(k.held)
	for _, d := range all {
		setCloexec(d.fd, false)
		defer setCloexec(d.fd, true)
	}
	// Being ignored outlives exec, until the new program asks for the signal.
	signal.Ignore(unix.SIGHUP)
	defer signal.Notify(k.upgrades, unix.SIGHUP)
	// From here on a signal to stop kills the process. Caught, it would be forgotten by the new program.
	signal.Stop(k.stops)
	signal.Reset(unix.SIGTERM, unix.SIGINT)
	defer signal.Notify(k.stops, unix.SIGTERM, unix.SIGINT)
	if len(k.stops) > 0 {
		return errors.New("it is to stop")
	}
	err := unix.Exec(k.path, os.Args, append(os.Environ(), variable+"="+all.String()))
	return fmt.Errorf("%s: %w", k.path, err)
}

// leave lets go of everything. A FUSE connection that is in use goes to a holder.
func (k *keeper) leave() error {
	var err error
	k.prune()
	if _, ok := k.held[fuseName]; ok && (k.InUse == nil || k.InUse()) {
		if err = k.hold(); err != nil {
			err = fmt.Errorf("mounts that are in use are cut off, their containers must be started again: %w", err)
		}
	}
	for name, fd := range k.held {
		if path, ok := k.Sockets[name]; ok && k.systemd == "" {
			os.Remove(path)
		}
		unix.Close(fd)
	}
	return err
}

// hold starts a holder and returns when the next keeper can find it.
func (k *keeper) hold() error {
	fd, err := listen(k.Holder, unix.SOCK_SEQPACKET)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// In a session of its own, it does not end with a terminal's.
	p, err := start(k.HoldCommand, map[string]int{
		fuseName: k.held[fuseName], initName: k.held[initName], holderName: fd,
	}, &syscall.SysProcAttr{Setsid: true})
	if err != nil {
		os.Remove(k.Holder)
		return err
	}
	defer p.conn.Close()
	select {
	case m, ok := <-p.messages:
		if ok && m.text == "ready" {
			p.answer(nil)
			return p.Release()
		}
	case <-time.After(stopTimeout):
	}
	p.Kill()
	os.Remove(k.Holder)
	return fmt.Errorf("the holder, process %d, is not ready: %w", p.Pid, p.wait().err)
}
