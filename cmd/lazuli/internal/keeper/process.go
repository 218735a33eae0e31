package keeper

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A process is a child of a keeper.
//
// It speaks over a socket pair (SOCK_SEQPACKET), a message and then its answer: "keep" with the descriptors of the connection and
// of INIT; "ready"; "status TEXT". The answer is "ok", or else says what is wrong.
type process struct {
	*os.Process
	conn     *net.UnixConn
	messages chan message // closed when the child has closed its end
}

// A message is what a child says.
type message struct {
	text string
	fds  []int // which the receiver closes
}

func (m message) verb() (verb, rest string) {
	verb, rest, _ = strings.Cut(m.text, " ")
	return verb, rest
}

// start starts a child that gets this process's stdin, stdout and stderr and what is held. The thread that calls it must live on, see
// PR_SET_PDEATHSIG.
func start(command []string, held map[string]int, attr *syscall.SysProcAttr) (*process, error) {
	path, err := exec.LookPath(command[0])
	if err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(pair[1])
	conn, err := connOf(pair[0])
	if err != nil {
		return nil, err
	}
	files := []uintptr{0, 1, 2}
	var given descriptors
	for _, d := range append(sorted(held), descriptor{keeperName, pair[1]}) {
		given = append(given, descriptor{d.name, len(files)})
		files = append(files, uintptr(d.fd))
	}
	// os.StartProcess wants files, and with them the poller.
	pid, err := syscall.ForkExec(path, command, &syscall.ProcAttr{Env: environ(given), Files: files, Sys: attr})
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	child, err := os.FindProcess(pid)
	if err != nil {
		conn.Close()
		return nil, err
	}
	p := &process{Process: child, conn: conn, messages: make(chan message)}
	go p.listen() // until the child or the owner of p closes the connection
	return p, nil
}

// connOf makes a connection of a socket, which it owns.
func connOf(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

func (p *process) listen() {
	defer close(p.messages)
	for {
		m, err := receive(p.conn)
		if err != nil {
			return
		}
		p.messages <- m
	}
}

// receive reads one message with up to two descriptors.
func receive(conn *net.UnixConn) (message, error) {
	text, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(2*4))
	n, r, _, _, err := conn.ReadMsgUnix(text, rights)
	if err != nil {
		return message{}, err
	}
	m := message{text: string(text[:n])}
	controls, err := unix.ParseSocketControlMessage(rights[:r])
	if err != nil {
		return m, err
	}
	for _, c := range controls {
		fds, err := unix.ParseUnixRights(&c)
		if err != nil {
			return m, err
		}
		m.fds = append(m.fds, fds...)
	}
	return m, nil
}

// send writes one message.
func send(conn *net.UnixConn, text string, fds ...int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err := conn.WriteMsgUnix([]byte(text), rights, nil)
	return err
}

const ok = "ok"

// answer answers the child's last message. If it does not take the answer it is dead or about to be.
func (p *process) answer(err error) {
	text := ok
	if err != nil {
		text = err.Error()
	}
	send(p.conn, text)
}

// wait waits until the child has ended.
func (p *process) wait() life {
	state, err := p.Wait()
	if err != nil {
		return life{code: -1, err: err}
	}
	return life{code: state.ExitCode(), err: errors.New(state.String())}
}
