// Command bench measures cold starts: how long after "pull" a job of an image writes its first line, says that it is ready and
// ends, on a node that holds nothing, behind a link that is as slow as is asked for, by Lazuli and by others.
//
//	go run ./integration/bench -n 5 -out DIR
//
// It needs root, Linux, Go, iproute2, docker-registry and runc, and what the images are built with. In DIR it leaves bench.txt
// (medians, minima and maxima, and how they compare with what is wanted), bench.json (every run, with every request), bench.svg, and
// timelines, a text for each run: what was asked for when, and what the job said.
//
// # What is measured
//
// A run has a node of its own: a new folder with the root of a containerd 2.4, if the system has one, and of its snapshotter. Both are
// started and answer; everything is written to disk and the kernel's caches are dropped, but the programs themselves are read again, as
// a node that starts containers has them in memory. Then the clock starts and "ctr image pull" with it, and after that "ctr run" of
// the job, which writes lines to its standard output. The run ends when ctr does. All processes are killed and what they mounted is
// unmounted. Systems take turns, so that whatever else the machine does meets all of them.
//
// The registry is docker-registry with its files in memory: what is slow is the link. A proxy before it counts requests and the bytes
// of bodies, which are all that is between the registry and the link.
//
// Modes say what else there is than the cold start of the image's own job: see modes in measure.go. With several of them in one
// run of the program, goals that compare them are computed too.
//
// A run counts only if it was cold and did its work: the job said what it says when it is done, and a system that fetches everything
// fetched as much as the layers have; one that fetched nothing found it somewhere.
//
// # Where it runs
//
// The program starts itself again in namespaces of its own: of processes, mounts, and two of the network, one for the node and one for the
// registry. Names and addresses in them are nobody else's, and nothing of it outlives the program, however that ends. See
// stage.go. Two may run at once, though their times will not mean much.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A plan is what the command line asks for and what has been built for it. The measuring process gets it from the one that people start.
type plan struct {
	Images  []image
	Links   []link
	Systems []string
	Modes   []string
	Runs    int
	Timeout time.Duration
	Out     string // folder of the results
	Cache   string // folder of what takes long to make
	Work    string // folder that is removed at the end, on a disk
	Cgroup  string // name of the cgroup
	Programs
}

const usage = `usage: bench [flags]

Measures cold starts of images, by Lazuli and others, behind slow links: see the comment of the package.

  go run ./integration/bench -links "20ms,1000" -systems "lazuli overlayfs stargz" -n 1

Systems:
`

func main() {
	log.SetFlags(0)
	log.SetPrefix("bench: ")
	var err error
	switch os.Getenv(stageVariable) {
	case "init":
		os.Exit(initStage())
	case "measure":
		err = measureStage()
	default:
		err = start()
	}
	if err != nil {
		log.Fatal(err)
	}
}

// start is the program as people start it.
func start() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	var names []string
	for _, s := range systems {
		names = append(names, s.Name)
	}
	imageNames := flag.String("image", "py", "images: `py` or ros (built if they are not there), or NAME=DIR[=READY] for an OCI layout whose job says READY; spaces between them")
	links := flag.String("links", "bare 20ms,1000 80ms,100", "`links`: bare, or RTT,MBIT; spaces between them")
	systemNames := flag.String("systems", strings.Join(names, " "), "`systems`, spaces between them")
	modeNames := flag.String("mode", cold, "`modes`: what is measured, each with the systems that it makes sense for: "+strings.Join(modes, " ")+"; density is all that begin with read")
	n := flag.Int("n", 5, "`runs` of each system on each link in each mode")
	timeout := flag.Duration("timeout", 3*time.Minute, "a run that takes longer is ended and does not count")
	out := flag.String("out", "", "`folder` of the results (default: bench in Lazuli's cache folder)")
	program := flag.String("lazuli", "", "measure this `program` (default: lazuli as it is built now)")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), usage)
		for _, s := range systems {
			fmt.Fprintf(flag.CommandLine.Output(), "  %-15s %s\n", s.Name, s.What)
		}
		fmt.Fprintln(flag.CommandLine.Output(), "\nFlags:")
		flag.PrintDefaults()
	}
	flag.Parse()

	cache, err := cacheDir()
	if err != nil {
		return err
	}
	if *out == "" {
		*out = filepath.Join(cache, "bench")
	}
	p := &plan{Runs: *n, Timeout: *timeout, Cache: cache}
	if p.Out, err = filepath.Abs(*out); err != nil {
		return err
	}
	switch {
	case flag.NArg() > 0:
		return fmt.Errorf("%q: want flags only, see -help", flag.Args())
	case p.Runs < 1:
		return fmt.Errorf("-n %d: want at least 1", p.Runs)
	}
	for name := range strings.FieldsFuncSeq(*systemNames, separator) {
		if systemOf(name) == nil {
			return fmt.Errorf("-systems: there is no %s: there are %s", name, strings.Join(names, ", "))
		}
		p.Systems = append(p.Systems, name)
	}
	if p.Modes, err = parseModes(*modeNames); err != nil {
		return err
	}
	for s := range strings.FieldsSeq(*links) {
		l, err := parseLink(s)
		if err != nil {
			return err
		}
		p.Links = append(p.Links, l)
	}
	for s := range strings.FieldsSeq(*imageNames) {
		im, err := parseImage(s, cache)
		if err != nil {
			return err
		}
		p.Images = append(p.Images, im)
	}
	if len(p.Images)*len(p.Links)*len(p.Systems)*len(p.Modes) == 0 {
		return errors.New("nothing to measure: -image, -links, -systems and -mode want one name each at least")
	}
	if err := need(); err != nil {
		return err
	}
	if err := os.MkdirAll(p.Out, 0o755); err != nil {
		return err
	}
	if p.Programs, err = build(ctx, cache, *program); err != nil {
		return err
	}
	for _, im := range p.Images {
		if err := im.build(ctx); err != nil {
			return err
		}
	}
	return p.enter(ctx)
}

// separator is what may stand between names: links have commas in them, systems have not.
func separator(r rune) bool { return r == ' ' || r == ',' }

// measureStage is the program inside of its namespaces.
func measureStage() error {
	var p plan
	if err := json.Unmarshal([]byte(os.Getenv(planVariable)), &p); err != nil {
		return err
	}
	w, err := newWorld(&p)
	if err != nil {
		return err
	}
	return w.measure(context.Background())
}

// say reports progress.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s  %s\n", time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...))
}
