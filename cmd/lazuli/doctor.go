package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"lazuli/cmd/lazuli/internal/doctor"
)

func newDoctorCommand(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this machine can do and what is missing",
		Long: `Doctor finds out whether containers can start lazily on this machine, by trying. Each line says
"ok", "missing", or "without" for what only makes things better, and how to get what is missing.
The exit code is 0 if lazy starts work here.`,
		Example: `  lazuli doctor
  lazuli doctor --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			findings := doctor.Examine(a.Root)
			works := doctor.Works(findings)
			if asJSON {
				if err := writeJSON(cmd.OutOrStdout(), struct {
					Works    bool             `json:"works"`
					Findings []doctor.Finding `json:"findings"`
				}{works, findings}); err != nil {
					return err
				}
			} else {
				for _, f := range findings {
					state := "ok"
					if !f.OK {
						state = "without"
						if f.Required {
							state = "missing"
						}
					}
					fmt.Fprintf(cmd.OutOrStdout(), "%-8s %-12s %s\n", state, f.Name, f.Detail)
					if !f.OK {
						fmt.Fprintf(cmd.OutOrStdout(), "%-8s %-12s → %s\n", "", "", f.Fix)
					}
				}
			}
			if !works {
				return &exitError{1, errors.New("lazy starts do not work here yet: see what is missing above")}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}
