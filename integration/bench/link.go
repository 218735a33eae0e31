package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	nodeAddress     = "10.77.0.1"
	registryAddress = "10.77.0.2"
	registryHost    = registryAddress + ":5000"
)

// A link is between the node and the registry.
type link struct {
	Name string
	RTT  time.Duration // added to what the machine itself takes
	Mbit float64       // 10⁶ bits per second in each direction, with all headers from Ethernet up; 0 is as fast as it goes
}

func parseLink(s string) (link, error) {
	if s == "bare" {
		return link{Name: s}, nil
	}
	rtt, mbit, _ := strings.Cut(s, ",")
	l := link{Name: s}
	var err, err2 error
	l.RTT, err = time.ParseDuration(rtt)
	l.Mbit, err2 = strconv.ParseFloat(mbit, 64)
	if err != nil || err2 != nil || l.RTT < 0 || l.Mbit < 0 {
		return l, fmt.Errorf("link %q: want bare, or a round-trip time and 10^6 bits per second, such as 20ms,1000", s)
	}
	return l, nil
}

func (l link) bare() bool { return l.RTT == 0 && l.Mbit == 0 }

// A network is the two network namespaces, and the link between them. The process is in the node's; the registry's has no process in it, only
// a thread of this one, which does there what it is told.
type network struct {
	there chan func()
	stop  func() // ends the link
}

// newNetwork makes both ends, with a bare link.
func newNetwork(ctx context.Context) (*network, error) {
	n := &network{there: make(chan func()), stop: func() {}}
	entered := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		entered <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range n.there {
			f()
		}
	}()
	if err := <-entered; err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	here, there := func(f func() error) error { return f() }, n.far
	for _, side := range []struct {
		at      func(func() error) error
		address string
		more    []string
	}{
		{here, nodeAddress, []string{"link", "add", "wire0", "type", "veth", "peer", "name", "wire1"}},
		{there, registryAddress, nil},
	} {
		err := side.at(func() error {
			// What TCP learned of the path in one run is not for the next.
			err := errors.Join(os.WriteFile("/proc/sys/net/ipv4/tcp_no_metrics_save", []byte("1"), 0o644),
				ip(ctx, "link", "set", "lo", "up"), ip(ctx, "addr", "add", side.address+"/32", "dev", "lo"))
			if side.more != nil {
				err = errors.Join(err, ip(ctx, side.more...))
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	// The far end moves: the namespace is named by the thread in it.
	var tid int
	n.far(func() error { tid = unix.Gettid(); return nil })
	if err := ip(ctx, "link", "set", "wire1", "netns", strconv.Itoa(tid)); err != nil {
		return nil, err
	}
	return n, n.shape(ctx, link{})
}

// far calls f in the registry's namespace.
func (n *network) far(f func() error) error {
	err := make(chan error)
	n.there <- func() { err <- f() }
	return <-err
}

// shape makes the link what l says. Connections do not survive it.
func (n *network) shape(ctx context.Context, l link) error {
	n.stop()
	n.stop = func() {}
	if l.bare() {
		return n.route(ctx, "wire0", "wire1")
	}
	near, err := openTUN("slow0")
	if err != nil {
		return err
	}
	var far int
	err = n.far(func() (err error) { far, err = openTUN("slow1"); return err })
	if err != nil {
		return errors.Join(err, unix.Close(near))
	}
	var carriers sync.WaitGroup
	for _, ends := range [][2]int{{near, far}, {far, near}} {
		d := &direction{from: ends[0], to: ends[1], delay: l.RTT / 2, queue: l.RTT + 100*time.Millisecond}
		if l.Mbit > 0 {
			d.perByte = float64(time.Second) / (l.Mbit * 1e6 / 8)
		}
		packets := make(chan packet, 1<<16)
		carriers.Go(func() { d.receive(packets) })
		carriers.Go(func() { d.deliver(packets) })
	}
	n.stop = func() {
		// Without their devices the descriptors give errors, which end the carriers.
		ctx := context.WithoutCancel(ctx)
		err := errors.Join(ip(ctx, "link", "del", "slow0"), n.far(func() error { return ip(ctx, "link", "del", "slow1") }))
		if err != nil {
			say("%v", err)
			return
		}
		carriers.Wait()
		unix.Close(near)
		unix.Close(far)
	}
	return n.route(ctx, "slow0", "slow1")
}

// route makes two devices, one at each end, the way between the ends.
func (n *network) route(ctx context.Context, near, far string) error {
	up := func(device, here, there string) error {
		return errors.Join(ip(ctx, "link", "set", device, "up", "mtu", "1500", "txqueuelen", "10000"),
			ip(ctx, "route", "replace", there+"/32", "dev", device, "src", here))
	}
	return errors.Join(n.far(func() error { return up(far, registryAddress, nodeAddress) }), up(near, nodeAddress, registryAddress))
}

func ip(ctx context.Context, args ...string) error { return run(ctx, "ip", args...) }

// A direction carries packets one way, from one TUN device to another. The kernel's TCP does the rest: what a packet here is may be
// up to 64 KiB, which the kernel would cut into segments only at a real device, but costs the time that its segments take.
type direction struct {
	from, to int
	delay    time.Duration
	perByte  float64       // nanoseconds
	queue    time.Duration // a packet that would have to wait longer until it is sent is dropped
}

type packet struct {
	data []byte
	due  time.Time // when it has arrived
}

const (
	offloadHeader = 10      // of struct virtio_net_hdr, which is before each packet
	largest       = 66_000  // bytes of a packet with all headers
	ethernet      = 14 + 24 // bytes on the wire around an IP packet: header, checksum, preamble, gap
	ipAndTCP      = 20 + 32 // bytes of the headers that each further segment has, with TCP's timestamps
)

// receive takes packets and says when they are due.
func (d *direction) receive(packets chan<- packet) {
	defer close(packets)
	urgent()
	idle := time.Now() // when the wire is free
	for {
		b := make([]byte, largest)
		n, err := unix.Read(d.from, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n < offloadHeader {
			return
		}
		now := time.Now()
		if idle.Before(now) {
			idle = now
		}
		if d.perByte > 0 && idle.Sub(now) > d.queue {
			continue
		}
		idle = idle.Add(time.Duration(float64(onWire(b[:n])) * d.perByte))
		packets <- packet{b[:n], idle.Add(d.delay)}
	}
}

// onWire returns the bytes that a packet is on an Ethernet.
func onWire(b []byte) int {
	n := len(b) - offloadHeader
	segments := 1
	if size := int(binary.NativeEndian.Uint16(b[4:])); b[1] != 0 && size > 0 { // gso_type, gso_size
		segments = max(1, (n-ipAndTCP+size-1)/size)
	}
	return n + (segments-1)*ipAndTCP + segments*ethernet
}

// deliver hands packets over when they are due. It ends with receive, and drops what is under way.
func (d *direction) deliver(packets <-chan packet) {
	urgent()
	for p := range packets {
		if wait := time.Until(p.due); wait > 0 {
			ts := unix.NsecToTimespec(int64(wait)) // a timer of Go's comes a millisecond late when the machine is busy
			unix.Nanosleep(&ts, nil)
		}
		unix.Write(d.to, p.data) // an error is a packet lost
	}
}

// urgent gives the goroutine a thread that the scheduler prefers to what is measured.
func urgent() {
	runtime.LockOSThread()
	unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -15)
}

// openTUN makes a TUN device, which lasts until it is deleted or the descriptor is closed.
func openTUN(name string) (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("/dev/net/tun: %w", err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err == nil {
		// Checksums and segmentation of TCP are left to whoever takes the packet out: nobody.
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("tun device %s: %w", name, err)
	}
	return fd, nil
}
