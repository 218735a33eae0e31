package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What is measured in a run.
const (
	cold   = "cold"   // pull and run, on a node that has nothing
	second = "second" // run, on a node on which the same job has run before, once nothing more is fetched
	again  = "again"  // the same, at once
	twenty = "twenty" // pull, and run twenty containers at once; the times are of the last of them
	wrong  = "wrong"  // cold, with startup packs that are wrong; then the image is removed
	// pull and run a job that reads so many percent of the image's bytes of files instead of the image's own; it is ready when it has read them
	read = "read"
)

var modes = []string{cold, second, again, twenty, wrong, read + "5", read + "10", read + "25", read + "50", read + "100"}

func parseModes(s string) (list []string, err error) {
	for m := range strings.FieldsFuncSeq(s, separator) {
		switch {
		case m == "density":
			for _, m := range modes {
				if share(m) > 0 {
					list = append(list, m)
				}
			}
		case slices.Contains(modes, m):
			list = append(list, m)
		default:
			return nil, fmt.Errorf("-mode %s: there are %s, and density for all that begin with %s", m, strings.Join(modes, ", "), read)
		}
	}
	return list, nil
}

// share returns how many percent of an image a mode reads, 0 if it is not for that.
func share(mode string) int {
	n, _ := strconv.Atoi(strings.TrimPrefix(mode, read))
	return n
}

// A Run is what came out of one. Times are in seconds since its start.
type Run struct {
	Image  string `json:"image"`
	Link   string `json:"link"`
	System string `json:"system"`
	Mode   string `json:"mode"`
	// Void says why the run does not count, if it does not. What else is there then was measured, too.
	Void string `json:"void,omitempty"`

	Pull  float64 `json:"pull"`  // ctr image pull has ended; 0 if there is none
	First float64 `json:"first"` // the first line
	Ready float64 `json:"ready"` // the line that says that the job is ready
	Exit  float64 `json:"exit"`  // ctr run has ended

	Bytes      int64     `json:"bytes"`           // of answers that the registry has sent until then
	Needed     int64     `json:"needed"`          // bytes of files that reads have waited for; -1 if the system does not tell
	CPU        float64   `json:"cpu"`             // seconds, of everything from ctr to the job
	Overhead   float64   `json:"overhead"`        // of those, without what ran in containers; 0 if that is not known
	Daemon     int64     `json:"daemon"`          // most bytes of memory of the snapshotter, or of lazuli run; 0 if there is none
	Containerd int64     `json:"containerd"`      // and of containerd
	Pack       *packUse  `json:"pack,omitempty"`  // nil if the image has no startup pack of its own
	Wrong      *wrongUse `json:"wrong,omitempty"` // nil if the image has no wrong one
	Phases     []mark    `json:"phases,omitempty"`
	// Requests to the registry; those that have no end yet were under way.
	Requests []request `json:"requests"`
}

// A mark is when a phase of a run ended, as the system itself says.
type mark struct {
	What string  `json:"what"`
	At   float64 `json:"at"`
}

// A world is where runs happen.
type world struct {
	*plan
	network  *network
	registry *registry
	all, own cgroup                  // of everything, and of everything but containers
	mounts   []mount                 // those of before the first run
	nodes    int                     // how many there were
	prepared map[string]bool         // references of images that are in the registry
	packs    map[string]*startupPack // by image
	jobs     map[string]*job         // by image
}

// newWorld makes it, in fresh namespaces.
func newWorld(p *plan) (*world, error) {
	w := &world{plan: p, prepared: map[string]bool{}, packs: map[string]*startupPack{}, jobs: map[string]*job{}}
	module, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	if err := letGo(p.Work, p.Out, p.Cache, module, p.Lazuli); err != nil {
		return nil, err
	}
	if w.network, err = newNetwork(context.Background()); err != nil {
		return nil, err
	}
	if err := w.network.shape(context.Background(), link{}); err != nil {
		return nil, err
	}
	if w.all, err = makeCgroup(p.Cgroup); err != nil {
		return nil, err
	}
	if w.own, err = makeCgroup(p.Cgroup + "/own"); err != nil {
		return nil, err
	}
	w.registry, err = startRegistry(w.network, filepath.Join(p.Work, "registry"))
	return w, err
}

// measure does what is planned.
func (w *world) measure(ctx context.Context) error {
	var list []*system
	for _, name := range w.Systems {
		s := systemOf(name)
		if why := s.missing(ctx, w); why != "" {
			say("%s is left out: %s", name, why)
			continue
		}
		if !slices.ContainsFunc(w.Modes, s.fits) {
			continue
		}
		for _, im := range w.Images {
			_, err := w.prepare(ctx, im, s.form)
			if err == nil && s.snapshotter == "floor" {
				_, err = w.unpack(ctx, im)
			}
			if err != nil {
				return fmt.Errorf("%s for %s: %w", im.Name, name, err)
			}
		}
		list = append(list, s)
	}
	for _, im := range w.Images {
		for _, mode := range w.Modes {
			if percent := share(mode); percent > 0 {
				if _, err := w.list(ctx, im, percent); err != nil {
					return err
				}
			}
		}
	}
	var err error
	if w.mounts, err = mounts(); err != nil {
		return err
	}
	r, err := newReport(w.plan, list)
	if err != nil {
		return err
	}
	if r.total == 0 {
		return errors.New("no system is left")
	}
	say("%d runs; %s", r.total, r.remaining())
	for range w.Runs {
		for _, im := range w.Images {
			for _, l := range w.Links {
				if err := w.network.shape(ctx, l); err != nil {
					return err
				}
				w.registry.over(l)
				for _, mode := range w.Modes {
					for _, s := range list {
						if !s.fits(mode) {
							continue
						}
						if err := r.add(w.run(ctx, im, l, mode, s)); err != nil {
							return err
						}
					}
					if err := w.clear(len(r.runs) == r.total); err != nil {
						return err
					}
				}
			}
		}
	}
	return r.print(os.Stdout)
}

// clear deletes the nodes that were. An ext4 without a journal does not use inodes again for five seconds and looks at each of those that it may not
// use, so a run that comes at once would take longer.
func (w *world) clear(last bool) error {
	if err := os.RemoveAll(filepath.Join(w.Work, "n")); err != nil || last {
		return err
	}
	unix.Sync()
	time.Sleep(6 * time.Second)
	return nil
}

// run makes a node, measures, and takes the node down but for its files.
func (w *world) run(ctx context.Context, im image, l link, mode string, s *system) (*Run, error) {
	ctx, cancel := context.WithTimeout(ctx, w.Timeout)
	defer cancel()
	result := &Run{Image: im.Name, Link: l.Name, System: s.Name, Mode: mode, Needed: -1}
	w.nodes++
	var n *node
	var list string
	ref, err := w.prepare(ctx, im, s.form)
	if percent := share(mode); err == nil && percent > 0 {
		list, err = w.list(ctx, im, percent)
		im.Ready = "READY"
	}
	switch {
	case err != nil:
	case s.snapshotter == "floor":
		err = w.floor(ctx, im, result)
	default:
		if n, err = w.startNode(s, filepath.Join(w.Work, "n", fmt.Sprint(w.nodes))); err == nil {
			n.list = list
			err = n.measure(ctx, im, ref, result)
		}
	}
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("it took longer than %v: %w", w.Timeout, err)
		}
		result.Void = err.Error()
		if n != nil {
			result.Void += "\n" + n.logs()
		}
	}
	// What fails here would be in the way of the next run.
	return result, errors.Join(killOthers(1, os.Getpid(), w.registry.process.cmd.Process.Pid), unmountOthers(w.mounts))
}

// measure runs what the mode says on a node that has been started.
func (n *node) measure(ctx context.Context, im image, ref string, result *Run) error {
	w := n.w
	jobs := 1
	if result.Mode == twenty {
		jobs = 20
	}
	warm := result.Mode == second || result.Mode == again
	if warm {
		if err := n.do(ctx, im, ref, true, 1, &Run{}); err != nil {
			return err
		}
		if result.Mode == second {
			n.settle()
		}
	} else if err := forget(w.Lazuli, w.Ctr, w.Read, filepath.Dir(w.Containerd)+"/containerd-shim-runc-v2"); err != nil {
		return err
	}
	all, err := w.all.seconds()
	own, err2 := w.own.seconds()
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	before := n.account("1").needed
	w.registry.reset(time.Now())
	if err := n.do(ctx, im, ref, !warm, jobs, result); err != nil {
		return err
	}
	result.Requests, result.Bytes = w.registry.traffic()
	result.CPU, err = w.all.seconds()
	result.Overhead, err2 = w.own.seconds()
	result.CPU, result.Overhead = result.CPU-all, result.Overhead-own
	if n.s.snapshotter == "" {
		result.Overhead = 0 // its container is below it
	}
	if n.daemon != nil {
		result.Daemon = peak(n.daemon.cmd.Process.Pid)
	}
	if n.containerd != nil {
		result.Containerd = peak(n.containerd.cmd.Process.Pid)
	}
	after := n.account("1")
	result.Phases = after.phases
	if result.Needed = after.needed; before > 0 {
		result.Needed -= before
	}
	if p := w.packs[im.Name]; n.s.form == packed && !warm {
		result.Pack = p.use(result.Requests)
	}
	if n.s.form.wrong != nil && n.s.form.wrong != wrongPacks[0] {
		var err3 error
		result.Wrong, err3 = n.after(ctx, im, ref)
		err2 = errors.Join(err2, err3)
	}
	return errors.Join(err, err2, n.wasCold(im, result))
}

// wasCold says why a run was not cold.
func (n *node) wasCold(im image, result *Run) error {
	if result.Mode == second || result.Mode == again {
		return nil
	}
	if result.Bytes == 0 {
		return errors.New("not cold: nothing came from the registry")
	}
	if !n.s.whole {
		return nil
	}
	img, err := openLayout(im.Dir)
	if err != nil {
		return err
	}
	m, err := img.Manifest()
	if err != nil {
		return err
	}
	var layers int64
	for _, l := range m.Layers {
		layers += l.Size
	}
	if result.Bytes < layers {
		return fmt.Errorf("not cold: %d bytes came from the registry, the layers have %d", result.Bytes, layers)
	}
	return nil
}

// floor fetches the pack over the link and then runs the job, for the second time.
func (w *world) floor(ctx context.Context, im image, result *Run) error {
	j := w.jobs[im.Name]
	if err := finish(ctx, j.command(), io.Discard); err != nil {
		return err
	}
	start := time.Now()
	w.registry.reset(start)
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+registryHost+w.packs[im.Name].path, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	result.Pull = time.Since(start).Seconds()
	if err := result.clock(ctx, start, im, j.command()); err != nil {
		return err
	}
	result.Requests, result.Bytes = w.registry.traffic()
	return nil
}

// do pulls the image, if it is to be pulled, and runs jobs at once.
func (n *node) do(ctx context.Context, im image, ref string, pull bool, jobs int, result *Run) error {
	start := time.Now()
	if cmd := n.pull(ref); pull && cmd != nil {
		if err := finish(ctx, cmd, io.Discard); err != nil {
			return err
		}
		result.Pull = time.Since(start).Seconds()
	}
	all := make([]Run, jobs)
	errs := make([]error, jobs)
	var running sync.WaitGroup
	for i := range jobs {
		running.Go(func() {
			cmd := n.job(ref, fmt.Sprint(i+1))
			if errs[i] = all[i].clock(ctx, start, im, cmd); errs[i] == nil && n.s.snapshotter == "" {
				result.Daemon = cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10
			}
		})
	}
	running.Wait()
	for _, r := range all {
		result.First, result.Ready, result.Exit = max(result.First, r.First), max(result.Ready, r.Ready), max(result.Exit, r.Exit)
	}
	return errors.Join(errs...)
}

// clock runs a job's command and notes when its lines came and when it ended.
func (r *Run) clock(ctx context.Context, start time.Time, im image, cmd *exec.Cmd) error {
	lines := &lineClock{ready: im.Ready}
	err := finish(ctx, cmd, lines)
	r.Exit = time.Since(start).Seconds()
	if err != nil {
		return err
	}
	if lines.readyAt.IsZero() || !lines.done {
		return fmt.Errorf("the job did not say %s and DONE, but %q", im.Ready, lines.text)
	}
	r.First, r.Ready = lines.first.Sub(start).Seconds(), lines.readyAt.Sub(start).Seconds()
	return nil
}

// finish runs a command to its end.
func finish(ctx context.Context, cmd *exec.Cmd, stdout io.Writer) error {
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = stdout, &stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, &stderr)
	}
	return nil
}

// forget has the kernel write everything to disk and forget what it has read, and then read programs again.
func forget(programs ...string) error {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("without the right to drop the kernel's caches nothing is cold: %w", err)
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		return err
	}
	for _, p := range append(programs, runc) {
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// A lineClock takes a job's output and notes when lines came.
type lineClock struct {
	ready          string
	first, readyAt time.Time
	done           bool
	text           string // what came, for an error
	line           []byte // of which the end has not come
}

func (c *lineClock) Write(b []byte) (int, error) {
	now := time.Now()
	c.text += string(b[:min(len(b), max(0, 2000-len(c.text)))])
	c.line = append(c.line, b...)
	for {
		n, line, _ := bufio.ScanLines(c.line, false)
		if n == 0 {
			return len(b), nil
		}
		if c.first.IsZero() {
			c.first = now
		}
		if c.readyAt.IsZero() && bytes.HasPrefix(line, []byte(c.ready)) {
			c.readyAt = now
		}
		c.done = c.done || bytes.HasPrefix(line, []byte("DONE"))
		c.line = c.line[n:]
	}
}
